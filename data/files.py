"""Local files of a source: which ones a path stands for, what it passes over, and how each is opened."""

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from dash_train.data.errors import DataError

ENDINGS = {  # of the files that a folder is searched for; the second list is for folders that hold none of the first
    "text": ([""], []),
    "jsonl": ([".jsonl", ".ndjson"], [".json"]),
    "csv": ([".csv"], []),
    "parquet": ([".parquet"], []),
}


class Found(NamedTuple):
    """The files that a path stands for, in the order they are read, and how many of each kind it passes over."""

    files: list[Path]
    passed_over: Counter[str]


def find_files(path: Path, kind: str) -> Found:
    """Return the files of a source of some kind: the file itself, or what a folder or a glob holds.

    A path or a folder that exists is never taken for a pattern. In a folder, links are followed and hidden files and
    folders are passed over, as a pattern does it.
    """
    if path.is_dir():
        return _in_folder(path, kind)
    if path.is_file():
        return Found([path], Counter())
    there = next(folder for folder in path.parents if folder.is_dir() or folder == folder.parent)
    pattern = os.path.join(glob.escape(str(there)), path.relative_to(there))
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    once = [match for match in matches if not _leads_back(match, path)]
    passed_over = Counter(_unreadable(match) for match in once if not match.is_file() and not match.is_dir())
    passed_over["paths through links back to a folder around them"] = len(matches) - len(once)
    return Found(sorted(match for match in once if match.is_file()), +passed_over)


def _in_folder(folder: Path, kind: str) -> Found:
    passed_over: Counter[str] = Counter()
    files = sorted(_walk(folder, passed_over, frozenset()))
    for endings in ENDINGS[kind]:
        chosen = [file for file in files if _plain_name(file, kind).endswith(tuple(endings))]
        if chosen:
            break
    names = set(chosen)
    copies = {file for file in chosen if _compression(file) and file.with_suffix("") in names}
    passed_over["compressed copies of files beside them"] = len(copies)
    passed_over.update(f"{_ending(file)} files" for file in files if file not in names)
    return Found([file for file in chosen if file not in copies], +passed_over)


def _walk(folder: Path, passed_over: Counter[str], above: frozenset[str]) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden; `above` are the real paths of the folders around it."""
    here = above | {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            passed_over["hidden folders" if os.path.isdir(entry.path) else "hidden files"] += 1
        elif os.path.isfile(entry.path):  # entry.is_file() raises for a link to itself
            yield Path(entry.path)
        elif not os.path.isdir(entry.path):
            passed_over[_unreadable(Path(entry.path))] += 1
        elif os.path.realpath(entry.path) in here:
            passed_over["links back to a folder around them"] += 1
        else:
            yield from _walk(Path(entry.path), passed_over, here)


def _leads_back(file: Path, pattern: Path) -> bool:
    """Whether what `**` stands for goes through a link to a folder around it, which it follows dozens of times."""
    before, stars, _ = str(pattern).partition("**")
    given = len(Path(before).parts)
    links = (folder for folder in file.parents if stars and len(folder.parts) > given and folder.is_symlink())
    return any(link.parent.resolve().is_relative_to(link.resolve()) for link in links)


def _unreadable(path: Path) -> str:
    return "broken links" if path.is_symlink() else "devices and pipes"


def _plain_name(file: Path, kind: str) -> str:
    """The name without the compression's ending; parquet compresses inside its files."""
    return file.stem if _compression(file) and kind != "parquet" else file.name


def _ending(file: Path) -> str:
    compression = _compression(file) or ""
    return Path(file.name.removesuffix(compression)).suffix + compression or "nameless"


def _compression(file: Path) -> str | None:
    return file.suffix if file.suffix in OPENERS else None


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
MAGIC = {  # no text begins so
    b"\x1f\x8b": ".gz",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"\x04\x22\x4d\x18": ".lz4",
    b"7z\xbc\xaf\x27\x1c": ".7z",
}
TAR_PLACE, TAR_MARKS = slice(257, 265), (b"ustar\x0000", b"ustar  \0")


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes, decompressed where its name says so (.gz, .bz2, .xz, .zst).

    Raises:
        DataError: the contents are damaged or cut short, compressed in a way its name does not tell, or an archive.
    """
    compression = _compression(path)
    with path.open("rb") as file:
        beginning = file.read(10)
    found = next((ending for magic, ending in MAGIC.items() if beginning.startswith(magic)), None)
    if found and not compression:
        known = f"rename it to {path.name}{found}, by which it is known"
        fix = known if found in OPENERS else f"unpack it, {found} is not read"
        raise DataError(f"{path}:1: is compressed; {fix}")
    try:
        with OPENERS[compression](path) if compression else path.open("rb") as file:
            if file.peek(512)[TAR_PLACE] in TAR_MARKS:
                raise DataError(f"{path}:1: is a tar archive; unpack it")
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if not compression:
            raise
        raise DataError(
            f"{path}: damaged, cut short or not {compression[1:]} data ({error}); fetch the file again"
        ) from error
