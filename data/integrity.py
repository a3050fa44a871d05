"""Whether a prepared folder still holds the bytes that were written: hashed once a machine and change of a file."""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dash_train.data.errors import DataError
from dash_train.data.shards import META, ShardFile, check_size, read_meta

logger = logging.getLogger(__name__)

CONTENTS = "contents.json"
SPLITS = ("train", "validation")

Stamp = list[int]  # size, time of the last change, inode


def write_contents(folder: Path) -> None:
    """Write down the files of a folder for which no `meta.json` does it: those of the tokenizer, and the metas."""
    files = [folder / split / META for split in SPLITS] + sorted((folder / "tokenizer").iterdir())
    listed = [ShardFile(str(file.relative_to(folder)), file.stat().st_size, _sha256(file)) for file in files]
    (folder / CONTENTS).write_text(json.dumps([asdict(file) for file in listed], indent=1))


def check_contents(folder: Path) -> None:
    """Check the files of a prepared folder against the hashes they were written with.

    A file that was found right is not read again on this machine as long as its size, time and inode stay the same.

    Raises:
        DataError: a file is missing or holds other bytes; it is named.
    """
    remembered = _remembered(folder)
    changed = []
    for file in _expected(folder):
        check_size(folder / file.name, file.bytes, folder)
        if remembered.get(file.name) != _stamp(folder / file.name):
            changed.append(file)
    if changed:
        size = sum(file.bytes for file in changed) / 2**20
        logger.info("checking %d files of %s, %.0f MiB: once on each machine", len(changed), folder, size)
    for file in changed:
        if _sha256(folder / file.name) != file.sha256:
            raise DataError(
                f"{folder / file.name}: holds other bytes than were written; delete {folder} and prepare again"
            )
    if changed:
        remember(folder)


def remember(folder: Path) -> None:
    """Note that the files of a folder are right as they are now."""
    record = _record(folder)
    with suppress(OSError):  # without a place to note it, they are checked again
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({file.name: _stamp(folder / file.name) for file in _expected(folder)}))
        unfinished.rename(record)


def _expected(folder: Path) -> list[ShardFile]:
    listed = folder / CONTENTS
    files = []
    if listed.is_file():  # an earlier version wrote none
        try:
            files = TypeAdapter(list[ShardFile]).validate_json(listed.read_bytes())
        except ValidationError as error:
            raise DataError(f"{listed}: not a list of files; delete {folder} and prepare again") from error
    for split in SPLITS:
        meta = read_meta(folder / split)
        files += [ShardFile(f"{split}/{file.name}", file.bytes, file.sha256) for file in [meta.index, *meta.shards]]
    return files


def _remembered(folder: Path) -> dict[str, Stamp]:
    try:
        return TypeAdapter(dict[str, Stamp]).validate_json(_record(folder).read_bytes())
    except (OSError, ValidationError):
        return {}


def _record(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    return cache / "dash_train" / "checked" / f"{name}.json"


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as contents:
        while part := contents.read(2**20):
            digest.update(part)
    return digest.hexdigest()
