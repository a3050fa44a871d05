"""Files of a source: which ones a path stands for, what it passes over, and how each is opened."""

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeAlias

from dash_train.data.errors import DataError

ENDINGS = {  # of the files that a folder is searched for; the second list is for folders that hold none of the first
    "text": ([""], []),
    "jsonl": ([".jsonl", ".ndjson"], [".json"]),
    "csv": ([".csv"], []),
    "parquet": ([".parquet"], []),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file that fsspec reads: its address, its size in bytes and what changes when the file does."""

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    def __str__(self) -> str:
        return self.url


File: TypeAlias = Path | RemoteFile


class Found(NamedTuple):
    """The files that a path stands for, in the order they are read, and how many of each kind it passes over."""

    files: Sequence[File]
    passed_over: Counter[str]


def find_all(paths: Iterable[str], kind: str) -> Found:
    """Return the files that several paths stand for, each file once."""
    files: dict[str, File] = {}
    passed_over: Counter[str] = Counter()
    for path in paths:
        found = _find_remote(path, kind) if "://" in path else find_files(Path(path).expanduser(), kind)
        files |= {str(file): file for file in found.files}
        passed_over += found.passed_over
    return Found(list(files.values()), passed_over)


def stamp(file: File) -> tuple[str, int, int | str]:
    """Return the name of a file, its size and what changes when it does."""
    if isinstance(file, RemoteFile):
        return file.url, file.size, file.version
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


def find_files(path: Path, kind: str) -> Found:
    """Return the files of a source of some kind: the file itself, or what a folder or a glob holds.

    A path or a folder that exists is never taken for a pattern. In a folder, links are followed and hidden files and
    folders are passed over, as a pattern does it.
    """
    if path.is_dir():
        passed_over: Counter[str] = Counter()
        return _choose(sorted(_walk(path, passed_over, frozenset())), kind, passed_over)
    if path.is_file():
        return Found([path], Counter())
    there = next(folder for folder in path.parents if folder.is_dir() or folder == folder.parent)
    pattern = os.path.join(glob.escape(str(there)), path.relative_to(there))
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    once = [match for match in matches if not _leads_back(match, path)]
    passed_over = Counter(_unreadable(match) for match in once if not match.is_file() and not match.is_dir())
    passed_over["paths through links back to a folder around them"] = len(matches) - len(once)
    return Found(sorted(match for match in once if match.is_file()), +passed_over)


def _find_remote(url: str, kind: str) -> Found:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        passed_over: Counter[str] = Counter()
        if system.isfile(path):
            listed = {path: system.info(path)}
        elif system.isdir(path):
            listed = system.find(path, detail=True)
        else:
            listed = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
    except Exception as error:  # of many kinds: no such protocol, no access, no network
        raise DataError(f"{url}: cannot be listed ({_reason(error)}); check the address and the access") from error
    files = []
    given = len([*takewhile(lambda part: not glob.has_magic(part), PurePosixPath(path).parts)])
    for name, info in sorted(listed.items()):
        if any(part.startswith(".") for part in PurePosixPath(name).parts[given:]):
            passed_over["hidden files"] += 1
            continue
        changes = next((str(info[key]) for key in CHANGES if info.get(key)), "")
        files.append(RemoteFile(system.unstrip_protocol(name), info.get("size") or 0, changes))
    if system.isdir(path):
        return _choose(files, kind, passed_over)
    return Found(files, passed_over)


CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")  # by file system


def _choose(files: list[Any], kind: str, passed_over: Counter[str]) -> Found:
    """Choose those of a folder's files that are of a kind; count the others."""
    for endings in ENDINGS[kind]:
        chosen = [file for file in files if _plain_name(file, kind).endswith(tuple(endings))]
        if chosen:
            break
    names = {str(file) for file in chosen}
    copies = {file for file in chosen if str(file).removesuffix(compression_of(file) or "\0") in names - {str(file)}}
    passed_over["compressed copies of files beside them"] = len(copies)
    passed_over.update(f"{_ending(file)} files" for file in files if str(file) not in names)
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


def _plain_name(file: File, kind: str) -> str:
    """The name without the compression's ending; parquet compresses inside its files."""
    return file.name if kind == "parquet" else file.name.removesuffix(compression_of(file) or "")


def _ending(file: File) -> str:
    compression = compression_of(file) or ""
    return Path(file.name.removesuffix(compression)).suffix + compression or "nameless"


def compression_of(file: File) -> str | None:
    """Return the ending of a compressed file's name: .gz, .bz2, .xz or .zst."""
    ending = PurePosixPath(file.name).suffix
    return ending if ending in OPENERS else None


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
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
def open_raw(file: File) -> Iterator[io.BufferedReader]:
    """Open a local or remote file for reading the bytes that it holds."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield opened
        return
    import fsspec

    try:
        with fsspec.open(file.url, "rb") as opened:
            yield opened if isinstance(opened, io.BufferedReader) else io.BufferedReader(opened, 2**20)
    except ValueError:  # what the reader found wrong with the contents
        raise
    except Exception as error:  # of many kinds: the network's, the service's
        raise DataError(f"{file}: cannot be read ({_reason(error)}); try again") from error


@contextmanager
def open_file(file: File) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes, decompressed where its name says so (.gz, .bz2, .xz, .zst).

    Raises:
        DataError: the contents are damaged or cut short, compressed in a way its name does not tell, or an archive.
    """
    compression = compression_of(file)
    with open_raw(file) as raw:
        beginning = raw.peek(10)
        found = next((ending for magic, ending in MAGIC.items() if beginning.startswith(magic)), None)
        if found and not compression:
            known = f"rename it to {file.name}{found}, by which it is known"
            fix = known if found in OPENERS else f"unpack it, {found} is not read"
            raise DataError(f"{file}:1: is compressed; {fix}")
        try:
            with OPENERS[compression](raw) if compression else nullcontext(raw) as opened:
                if opened.peek(512)[TAR_PLACE] in TAR_MARKS:
                    raise DataError(f"{file}:1: is a tar archive; unpack it")
                yield opened
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if not compression:
                raise
            raise DataError(
                f"{file}: damaged, cut short or not {compression[1:]} data ({error}); fetch the file again"
            ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
