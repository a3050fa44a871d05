"""Documents of a source, one after the other: the standard library, local and remote files, or a Hugging Face dataset.

A source is read in parts that depend on it alone: they can be read by several jobs, and after each other give its
documents in a fixed order.
"""

import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dash_train.data.chat import ConversationOf
from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.files import ENDINGS, File, Found, compression_of, find_all, open_file, stamp
from dash_train.data.records import Record, TextOf, csv_records, is_array, json_records, parquet_records

PART_BYTES = 16 * 2**20  # of a part, at least; a file that cannot be divided is one, whatever its size
MOST_PARTS = 4096  # of a source
STREAMS = 64  # of a streamed dataset


class Document(NamedTuple):
    """One document and where it came from, which reads `file`, `file:line` or `dataset:row`."""

    text: str
    origin: object


class Part(NamedTuple):
    """A part of a source: whole files, or bytes (of JSON lines), row groups (of parquet) or rows `first` to `stop` of
    one, or the stream `first` of `stop` of a streamed dataset. `size` is in bytes, 0 where it is unknown."""

    files: list[File]
    first: int = 0
    stop: int | None = None
    size: int = 0
    rows: Any = None  # the dataset, of a Hugging Face source


def read_documents(source: SourceConfig, reject: Callable[[str], None]) -> Iterator[Document]:
    """Yield the documents of one source in a fixed order; empty ones are passed over.

    `reject(message)` is called for each malformed document, with one line that begins with its origin; when it
    returns, reading goes on with the next one. A source that cannot be read at all is a `DataError`.
    """
    for part in split_source(source):
        yield from read_part(source, part, reject)


def read_part(source: SourceConfig, part: Part, reject: Callable[[str], None]) -> Iterator[Document]:
    """Yield the documents of a part of a source."""
    if source.type == "stdlib":
        documents = _whole_files(part, reject=lambda _: None)  # it holds a few non-UTF-8 test files
    elif source.type == "text":
        documents = _whole_files(part, reject)
    else:
        documents = _texts(source, part, reject)
    return (document for document in documents if document.text)


def split_source(source: SourceConfig) -> list[Part]:
    """Divide a source into parts of about `PART_BYTES`: small files together, large ones where that can be done."""
    if source.type == "huggingface":
        return _hub_parts(source)
    sized = [(file, stamp(file)[1]) for file in source_files(source)]
    enough = max(PART_BYTES, sum(size for _, size in sized) // MOST_PARTS)
    parts: list[Part] = []
    for file, size in sized:
        pieces = _divide(source, file, size, enough) if size >= 2 * enough else []
        last = parts[-1] if parts else None
        if pieces:
            parts += pieces
        elif last and last.stop is None and last.size < enough:
            last.files.append(file)
            parts[-1] = last._replace(size=last.size + size)
        else:
            parts.append(Part([file], size=size))
    return parts


def _divide(source: SourceConfig, file: File, size: int, enough: int) -> list[Part]:
    """Divide one large file; not at all where that takes reading it."""
    if source.type == "jsonl" and not compression_of(file):
        with open_file(file) as lines:
            if is_array(lines):
                return []
        bounds = [*range(0, size - enough + 1, enough), size]
    elif source.type == "parquet":
        return _parquet_parts(file, size, enough)
    else:
        return []
    return [Part([file], first, stop, stop - first) for first, stop in pairwise(bounds)]


def _parquet_parts(file: File, size: int, enough: int) -> list[Part]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if not isinstance(file, Path):
        return []
    try:
        with ParquetFile(file) as table:
            groups = table.num_row_groups
    except (ArrowException, OSError):
        return []  # reading it tells what is wrong
    step = max(1, groups * enough // size)
    firsts = range(0, groups, step)
    return [Part([file], first, min(first + step, groups), size // len(firsts)) for first in firsts]


def source_files(source: SourceConfig) -> Sequence[File]:
    """Return the files of a source, sorted by path. Finding no file is an error, but for a Hugging Face dataset, which
    has files of its own only where it is a folder that `save_to_disk` wrote.

    The standard library is every `*.py` below the running Python's library folder, installed packages left out.
    """
    if source.type == "huggingface":
        saved = Path(source.path or "").expanduser()
        return sorted(saved.rglob("*.arrow")) if _is_saved(saved) else []
    if source.type == "stdlib":
        return _standard_library()
    found = _found(source)
    if not found.files:
        beside = f" (but {_list(found.passed_over)})" if found.passed_over else ""
        where = ", ".join(_paths(source))
        raise DataError(
            f"{where}: no {source.type} file here{beside}; data.sources.path takes a file, a folder or a glob"
        )
    return found.files


def _standard_library() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _paths(source: SourceConfig) -> list[str]:
    """The paths of a source: its own, or its patterns, which stand below it."""
    if source.data_files is None:
        if source.path is None:
            raise DataError(f"data.sources: a {source.type} source needs path: a file, a folder or a glob")
        return [source.path]
    patterns = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    return [os.path.join(source.path or "", pattern) for pattern in patterns]


def _found(source: SourceConfig) -> Found:
    return find_all(_paths(source), source.type)


def passed_over(source: SourceConfig) -> str:
    """Say by kind and count what a source's folder or glob holds and is not read; empty when it is nothing."""
    if source.type not in ENDINGS:
        return ""
    found = _found(source)
    return f"{', '.join(_paths(source))}: not read: {_list(found.passed_over)}" if found.passed_over else ""


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def describe(source: SourceConfig) -> str:
    """Name a source in one word or two, for logs and metadata."""
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files or []
    return " ".join(part for part in (source.type, source.path, source.name, *files) if part)


def _whole_files(part: Part, reject: Callable[[str], None]) -> Iterator[Document]:
    for file in part.files:
        try:
            # Bytes, not read_text: that would turn \r\n into \n.
            with open_file(file) as contents:
                yield Document(contents.read().decode("utf-8"), file)
        except UnicodeDecodeError as error:
            reject(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})")


def _texts(source: SourceConfig, part: Part, reject: Callable[[str], None]) -> Iterator[Document]:
    text_of = ConversationOf() if source.supervised else TextOf(source.field, source.template)
    for record in _records(source, part, list(text_of.fields), reject):
        text = text_of.of(record, reject)
        if text is not None:
            yield Document(text, record.origin)


def _records(source: SourceConfig, part: Part, fields: list[str], reject: Callable[[str], None]) -> Iterator[Record]:
    if source.type == "huggingface":
        yield from _hub_records(source, part)
    for file in part.files:
        if source.type == "jsonl":
            yield from json_records(file, part.first, part.stop, reject)
        elif source.type == "csv":
            yield from csv_records(file, reject)
        elif source.type == "parquet":
            yield from parquet_records(file, fields, part.first, part.stop, reject)


def _hub_parts(source: SourceConfig) -> list[Part]:
    with _naming(source.path):
        dataset = _dataset(source)
        if source.streaming:
            streams = min(source.streams or STREAMS, dataset.num_shards)
            return [Part([], stream, streams, rows=dataset) for stream in range(streams)]
        rows, size = len(dataset), dataset.data.nbytes
    parts = max(1, min(size // PART_BYTES, MOST_PARTS, rows))
    bounds = [rows * part // parts for part in range(parts + 1)]
    return [Part([], *some, size // parts, dataset) for some in pairwise(bounds)]


def _hub_records(source: SourceConfig, part: Part) -> Iterator[Record]:
    first, stop = part.first, part.stop
    assert stop is not None
    with _naming(source.path):
        if not source.streaming:
            for number, values in enumerate(part.rows.select(range(first, stop)), start=first + 1):
                yield Record(values, f"{source.path}:{number}")
            return
        stream = part.rows.shard(num_shards=stop, index=first)
        if source.documents is not None:
            stream = stream.take(source.documents * (first + 1) // stop - source.documents * first // stop)
        for number, values in enumerate(stream, start=1):
            yield Record(values, f"{source.path}, stream {first} of {stop}:{number}")


def _dataset(source: SourceConfig) -> Any:
    """Open a dataset of the Hub, or what `save_to_disk` wrote: a Dataset, or the split of a DatasetDict."""
    import datasets

    saved = Path(source.path or "").expanduser()
    if not _is_saved(saved):
        options: dict[str, Any] = {"data_files": source.data_files} if source.data_files else {}
        return datasets.load_dataset(
            source.path, source.name, split=source.split, streaming=source.streaming, **options
        )
    dataset = datasets.load_from_disk(str(saved))
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise DataError(f"{saved}: no split {source.split!r} among {sorted(dataset)}; set data.sources.split")
        dataset = dataset[source.split]
    if source.streaming:
        return dataset.to_iterable_dataset(num_shards=max(1, min(source.streams or STREAMS, len(dataset))))
    return dataset


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


@contextmanager
def _naming(path: str | None) -> Iterator[None]:
    """Give an error of the datasets library one line that names the dataset."""
    if path is None:
        raise DataError("data.sources: a huggingface source needs path: the name of the dataset")
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of many kinds: missing, private, offline, corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the datasets library cannot read this: {reason}") from error
