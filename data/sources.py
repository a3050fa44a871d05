"""Documents of a source, one after the other: the standard library, local files, or a Hugging Face dataset."""

import glob
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError

FILE_PATTERNS = {"text": "*", "jsonl": "*.jsonl", "parquet": "*.parquet"}


class Document(NamedTuple):
    """One document and where it came from: `file`, `file:line` or `dataset:row`."""

    text: str
    origin: str


def read_documents(source: SourceConfig, reject: Callable[[str], None]) -> Iterator[Document]:
    """Yield the documents of one source in a fixed order; empty ones are passed over.

    `reject(message)` is called for each malformed document, with one line that begins with its origin; when it
    returns, reading goes on with the next one. A source that cannot be read at all is a `DataError`.
    """
    if source.type == "stdlib":
        documents = _whole_files(source_files(source), reject=lambda _: None)  # it holds a few non-UTF-8 test files
    elif source.type == "text":
        documents = _whole_files(source_files(source), reject)
    elif source.type == "jsonl":
        documents = _json_lines(source_files(source), source.field, reject)
    elif source.type == "parquet":
        documents = _parquet_rows(source_files(source), source.field, reject)
    else:
        documents = _hub_rows(source, reject)
    return (document for document in documents if document.text)


def source_files(source: SourceConfig) -> list[Path]:
    """Return the local files of a source, sorted by path; none for a Hugging Face dataset. Finding no file is an error.

    The standard library is every `*.py` below the running Python's library folder, installed packages left out.
    """
    if source.type == "huggingface":
        return []
    if source.type == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        packages = {"site-packages", "dist-packages"}
        return sorted(path for path in root.rglob("*.py") if not packages & set(path.relative_to(root).parts))
    if source.path is None:
        raise DataError(f"data.sources: a {source.type} source needs path: a file, a folder or a glob")
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = path.rglob(FILE_PATTERNS[source.type])
        files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    else:
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if not files:
        raise DataError(f"{path}: no {source.type} file here; data.sources.path takes a file, a folder or a glob")
    return files


def describe(source: SourceConfig) -> str:
    """Name a source in one word or two, for logs and metadata."""
    return " ".join(part for part in (source.type, source.path, source.name) if part)


def _whole_files(files: Iterable[Path], reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        try:
            # Bytes, not read_text: that would turn \r\n into \n.
            yield Document(file.read_bytes().decode("utf-8"), str(file))
        except UnicodeDecodeError as error:
            reject(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})")


def _json_lines(files: Iterable[Path], field: str, reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                origin = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                    reject(f"{origin}: not a JSON object ({error})")
                    continue
                yield from _field(record, field, origin, reject)


def _parquet_rows(files: Iterable[Path], field: str, reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        # Streaming reads the file where it lies; otherwise datasets would first copy it into its own cache.
        records = _records(str(file), "parquet", data_files=str(file), split="train", streaming=True)
        for number, record in enumerate(records, start=1):
            yield from _field(record, field, f"{file}:{number}", reject)


def _hub_rows(source: SourceConfig, reject: Callable[[str], None]) -> Iterator[Document]:
    if source.path is None:
        raise DataError("data.sources: a huggingface source needs path: the name of the dataset")
    records = _records(source.path, source.path, source.name, split=source.split)
    for number, record in enumerate(records, start=1):
        yield from _field(record, source.field, f"{source.path}:{number}", reject)


def _records(origin: str, *dataset: str | None, **options: Any) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(*dataset, **options)
    except Exception as error:  # of many kinds: missing, private, offline, corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{origin}: the datasets library cannot read this: {reason}") from error


def _field(record: Any, field: str, origin: str, reject: Callable[[str], None]) -> Iterator[Document]:
    """Yield the one text of a record, or reject it."""
    if not isinstance(record, dict):
        reject(f"{origin}: expected an object with fields, found {type(record).__name__}")
    elif field not in record:
        reject(f"{origin}: no field {field!r} among {sorted(record)}; set data.sources.field")
    elif not isinstance(record[field], str):
        reject(f"{origin}: field {field!r} holds {type(record[field]).__name__}, expected a string")
    elif not _encodable(record[field]):
        reject(f"{origin}: field {field!r} holds half of a surrogate pair, which no UTF-8 text can")
    else:
        yield Document(record[field], origin)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
