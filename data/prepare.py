"""From text to token shards, once: later runs with the same sources and settings find them in the cache."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dash_train.data.chat import with_chat_template, words_of
from dash_train.data.config import DataConfig, SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.files import File, stamp
from dash_train.data.integrity import SPLITS, check_contents, remember, write_contents
from dash_train.data.pieces import BadDocuments, Pieces, Task, encode
from dash_train.data.shards import FORMAT_VERSION, ShardWriter, read_meta
from dash_train.data.sources import describe, passed_over, read_documents, source_files, split_source
from dash_train.data.split import SplitDocument, is_held_out, split_documents, uniform
from dash_train.data.tokenizer import Tokenizer, load_tokenizer, lost_by, train_tokenizer

logger = logging.getLogger(__name__)

REVISION = 2  # rises when the same sources and settings come out otherwise
SOON = 60.0  # seconds of work that are not worth keeping after an error


def prepare(config: DataConfig) -> Path:
    """Return the folder of the prepared data, making it first when the cache has none.

    It holds `tokenizer/`, `train/` and `validation/`, and is named by what it is made from: the sources (paths, sizes
    and times of local files), the tokenizer, the split and the shard format. It appears all at once or not at all;
    when two processes make the same one, the first to finish wins and the other's work is dropped. What a process that
    was killed has tokenized is in a folder beside it, from which the next one goes on.
    """
    made = prepare_part(config, 1, 1)
    assert made is not None
    return made


def prepare_part(config: DataConfig, part: int, parts: int) -> Path | None:
    """Tokenize the share of the corpus that is part `part` (from 1) of `parts`.

    Return the folder of the prepared data once all parts of it are there, put together by the last one; else None.
    The result is the same however many parts there are.
    """
    cache = Path(config.cache).expanduser()
    folder, earlier = (cache / key for key in cache_keys(config))
    for made in (folder, earlier):
        if made.exists() and (made is folder or _still_right(config, made)):
            check_contents(made)
            return made
    work = folder.with_name(f".{folder.name}-work")
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    started, begun = time.monotonic(), work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not _write(config, work, unfinished, (part, parts)):
            return None
        write_contents(unfinished)
        if not folder.exists():
            unfinished.rename(folder)
            remember(folder)
        shutil.rmtree(work, ignore_errors=True)
    except (OSError, DataError) as error:
        if folder.exists():  # another process finished it, and took its pieces away
            return folder
        if not begun and time.monotonic() - started < SOON:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, DataError):
            raise
        fix = "free space, or set data.cache to another disk" if error.errno == errno.ENOSPC else "check the path"
        raise DataError(f"{error.filename or folder}: cannot prepare data: {error.strerror}; {fix}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _still_right(config: DataConfig, earlier: Path) -> bool:
    """Whether a folder of revision 1 is what this one would make.

    It left long lines out of a tokenizer's training, cut texts where a tokenizer.json says so, named compressed files
    bad documents, and could leave copies of the only held-out document in the training part.
    """
    if config.tokenizer.path is None or config.on_bad_document != "error":
        return False
    meta = read_meta(earlier / "validation")
    return meta.documents > 1 and meta.tokenizer_hash == load_tokenizer(config.tokenizer.path).hash


def cache_key(config: DataConfig) -> str:
    """Return the name of the folder that holds a configuration's prepared data."""
    return cache_keys(config)[0]


def cache_keys(config: DataConfig) -> list[str]:
    """Return that name, and the one under which revision 1 made the folder."""
    made_from: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "sources": [_read_by(source) for source in config.sources],
        "files": [_stamps(source_files(source)) for source in config.sources],
        "tokenizer": config.tokenizer.model_dump(),
        "tokenizer_files": _stamps(_tokenizer_files(config)),
        "split": [config.seed, config.validation_fraction],
        "on_bad_document": config.on_bad_document,
        "shard_tokens": config.shard_tokens,
    }
    if config.validation:  # a key that earlier versions did not have
        made_from["validation"] = [[_read_by(source), _stamps(source_files(source))] for source in config.validation]
    revisions = ({**made_from, "revision": REVISION}, made_from)
    return [hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16] for values in revisions]


def _read_by(source: SourceConfig) -> dict[str, Any]:
    """What decides the documents of a source; keys that earlier versions did not have only where they are set."""
    values = source.model_dump(exclude={"weight", "max_passes", "length_weights"})
    return {key: value for key, value in values.items() if value or key in ("type", "path", "name", "split", "field")}


def _stamps(files: Iterable[File]) -> list[tuple[str, int, int | str]]:
    return [stamp(file) for file in files]


def _tokenizer_files(config: DataConfig) -> list[Path]:
    if config.tokenizer.path is None:
        return []
    path = Path(config.tokenizer.path).expanduser()
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []


def _write(config: DataConfig, work: Path, folder: Path, part: tuple[int, int]) -> bool:
    """Make this job's pieces in `work`. When all are there, put them together in `folder`, and return True."""
    bad = BadDocuments(config.on_bad_document)
    for source in [*config.sources, *config.validation]:
        if message := passed_over(source):
            logger.warning("%s", message)
    tokenizer = _tokenizer(config, work / "tokenizer", bad)
    threads = config.workers or os.cpu_count() or 1
    started = time.monotonic()
    pieces = Pieces(work, _tasks(config, bad))
    pieces.make(range(part[0] - 1, len(pieces.tasks), part[1]), tokenizer, threads, bad)
    if missing := pieces.missing():
        logger.info("%d of %d pieces of the corpus are still to be made", len(missing), len(pieces.tasks))
        return False
    sources, validation = (
        [describe(source) for source in of] for of in (config.sources, config.validation or config.sources)
    )
    writers = {
        split: ShardWriter(folder / split, tokenizer, names, config.shard_tokens, _supervised(config))
        for split, names in zip(SPLITS, (sources, validation), strict=True)
    }
    for task, piece in pieces.all():
        bad.skipped |= set(piece.skipped)
        for split, writer in writers.items():
            writer.extend(piece.tokens[split], piece.lengths[split], task.number, piece.text_bytes[split])
    if not all(writer.documents for writer in writers.values()):
        shutil.rmtree(folder)
        writers = _write_few(config, folder, tokenizer, threads, bad)
    for writer in writers.values():
        writer.close()
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    documents, tokens, text_bytes = (
        sum(getattr(writer, counter) for writer in writers.values())
        for counter in ("documents", "tokens", "text_bytes")
    )
    logger.info(
        "prepared %d documents, %d tokens, %.2f bytes per token, %d skipped, %.0f s",
        documents,
        tokens,
        text_bytes / tokens,
        len(bad.skipped),
        time.monotonic() - started,
    )
    return True


def _write_few(
    config: DataConfig, folder: Path, tokenizer: Tokenizer, threads: int, bad: BadDocuments
) -> dict[str, ShardWriter]:
    """Tokenize a corpus that is so small that the hashes of its documents hold out none of them, or all."""
    if config.validation:
        empty = ", ".join(describe(source) for source in config.validation)
        raise DataError(f"data.validation: no text in {empty}, or no other text in data.sources")
    names = [describe(source) for source in config.sources]
    writers = {
        split: ShardWriter(folder / split, tokenizer, names, config.shard_tokens, _supervised(config))
        for split in SPLITS
    }
    for document in _documents(config, bad):
        tokens, lengths = encode([document.text], config.sources[document.source], tokenizer, threads, bad)
        writers[document.split].extend(tokens, lengths, document.source, len(document.text.encode("utf-8")))
    return writers


def _supervised(config: DataConfig) -> bool:
    return any(source.supervised for source in [*config.sources, *config.validation])


def _tasks(config: DataConfig, bad: BadDocuments) -> list[Task]:
    """The parts of all sources, in the order in which their documents stand in the shards."""
    split_of = _split_of(config, bad)
    tasks = [
        Task(source, number, part, split_of)
        for number, source in enumerate(config.sources)
        for part in split_source(source)
    ]
    return tasks + [
        Task(source, number, part, lambda _: "validation")
        for number, source in enumerate(config.validation)
        for part in split_source(source)
    ]


def _split_of(config: DataConfig, bad: BadDocuments) -> Callable[[str], str | None]:
    """Return what tells the split of a text of the sources."""
    seed = config.seed
    if not config.validation:
        return lambda text: "validation" if is_held_out(text, seed, config.validation_fraction) else "train"
    held_out = {uniform(d.text, seed) for source in config.validation for d in read_documents(source, bad.reject)}
    return lambda text: None if uniform(text, seed) in held_out else "train"


def _documents(config: DataConfig, bad: BadDocuments) -> Iterator[SplitDocument]:
    """Read all sources in order. No document at all is an error."""
    texts = (
        (document.text, number)
        for number, source in enumerate(config.sources)
        for document in read_documents(source, bad.reject)
    )
    documents: Iterator[SplitDocument]
    if config.validation:
        split_of = _split_of(config, bad)
        documents = (SplitDocument(text, number, "train") for text, number in texts if split_of(text))
    else:
        documents = split_documents(texts, config.seed, config.validation_fraction)
    first = next(documents, None)
    if first is None:
        sources = ", ".join(describe(source) for source in config.sources)
        raise DataError(f"data.sources: no text in {sources}; expected at least one document that is not empty")
    return chain([first], documents)


def _has_chats(config: DataConfig, bad: BadDocuments) -> bool:
    """Whether the supervised sources, of which the first row tells, need a chat template."""
    first = (
        next(read_documents(source, bad.reject), None)
        for source in [*config.sources, *config.validation]
        if source.supervised
    )
    return any("messages" in json.loads(document.text) for document in first if document is not None)


def _tokenizer(config: DataConfig, folder: Path, bad: BadDocuments) -> Tokenizer:
    """Load the configured tokenizer, or train one on the training documents, and keep it in `folder`.

    Jobs that share a preparation find that of the first one that has it; all would make the same.
    """
    if folder.exists():
        return load_tokenizer(folder)
    unfinished = folder.with_name(f".tokenizer-{uuid.uuid4().hex[:8]}")
    if config.tokenizer.path is None:
        texts = (
            words_of(document.text) if config.sources[document.source].supervised else document.text
            for document in _documents(config, bad)
            if document.split == "train"
        )
        tokenizer = train_tokenizer(texts, config.tokenizer, unfinished / "tokenizer.model")
    else:
        tokenizer = load_tokenizer(config.tokenizer.path)
        tokenizer.check_exportable()
        if lost := lost_by(tokenizer):
            logger.warning(
                "%s: the tokenizer changes text, the model never sees these as they are: %s",
                config.tokenizer.path,
                ", ".join(lost),
            )
        tokenizer.save(unfinished)
    if _has_chats(config, bad):
        tokenizer = with_chat_template(tokenizer, unfinished)
    if not folder.exists():
        unfinished.rename(folder)
    return tokenizer
