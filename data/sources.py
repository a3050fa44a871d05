"""Documents of a source, one after the other: the standard library, local files, or a Hugging Face dataset."""

import csv
import io
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.files import find_files, open_file

ROWS_AT_ONCE = 1000
EXTRA = "\0"  # the key of the values of a CSV row for which the header has no name


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
    elif source.type == "csv":
        documents = _csv_rows(source_files(source), source.field, reject)
    elif source.type == "parquet":
        documents = _parquet_rows(source_files(source), source.field, reject)
    else:
        documents = _hub_rows(source, reject)
    return (document for document in documents if document.text)


def source_files(source: SourceConfig) -> list[Path]:
    """Return the local files of a source, sorted by path. Finding no file is an error, but for a Hugging Face dataset,
    which has local files only where it is a folder that `save_to_disk` wrote.

    The standard library is every `*.py` below the running Python's library folder, installed packages left out.
    """
    if source.type == "huggingface":
        saved = Path(source.path or "").expanduser()
        return sorted(saved.rglob("*.arrow")) if _is_saved(saved) else []
    if source.type == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        packages = {"site-packages", "dist-packages"}
        return sorted(path for path in root.rglob("*.py") if not packages & set(path.relative_to(root).parts))
    if source.path is None:
        raise DataError(f"data.sources: a {source.type} source needs path: a file, a folder or a glob")
    path = Path(source.path).expanduser()
    found = find_files(path, source.type)
    if not found.files:
        beside = f" (but {_list(found.passed_over)})" if found.passed_over else ""
        raise DataError(
            f"{path}: no {source.type} file here{beside}; data.sources.path takes a file, a folder or a glob"
        )
    return found.files


def passed_over(source: SourceConfig) -> str:
    """Say by kind and count what a local source's folder or glob holds and is not read; empty when it is nothing."""
    if source.type in ("stdlib", "huggingface"):
        return ""
    found = find_files(Path(str(source.path)).expanduser(), source.type)
    return f"{source.path}: not read: {_list(found.passed_over)}" if found.passed_over else ""


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def describe(source: SourceConfig) -> str:
    """Name a source in one word or two, for logs and metadata."""
    return " ".join(part for part in (source.type, source.path, source.name) if part)


def _whole_files(files: Iterable[Path], reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        try:
            # Bytes, not read_text: that would turn \r\n into \n.
            with open_file(file) as contents:
                yield Document(contents.read().decode("utf-8"), str(file))
        except UnicodeDecodeError as error:
            reject(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})")


def _json_lines(files: Iterable[Path], field: str, reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        with open_file(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                origin = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or nested without end
                    reject(f"{origin}: not a JSON object ({error})")
                    continue
                yield from _field(record, field, origin, reject)


def _csv_rows(files: Iterable[Path], field: str, reject: Callable[[str], None]) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KB
    for file in files:
        with open_file(file) as contents:
            # A byte that is not UTF-8 becomes half of a surrogate pair, for which its row alone is rejected.
            lines = io.TextIOWrapper(contents, encoding="utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.DictReader(lines, restkey=EXTRA, strict=True)
            try:
                for row in rows:
                    if EXTRA in row:
                        reject(f"{file}:{rows.line_num}: more values than the header has names")
                        continue
                    yield from _field(row, field, f"{file}:{rows.line_num}", reject)
            except csv.Error as error:
                raise DataError(f"{file}:{rows.line_num}: not CSV ({error}); mend the file") from error


def _parquet_rows(files: Iterable[Path], field: str, reject: Callable[[str], None]) -> Iterator[Document]:
    for file in files:
        for number, record in enumerate(_parquet_records(file, field, reject), start=1):
            yield from _field(record, field, f"{file}:{number}", reject)


def _parquet_records(file: Path, field: str, reject: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, with only the column that the field is in."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, page_checksum_verification=True) as table:
            columns = table.schema_arrow.names
            column = field if field in columns else field.partition(".")[0]
            if column not in columns:
                rows = table.metadata.num_rows
                reject(f"{file}: no field {field!r} among {sorted(columns)} in its {rows} rows; set data.sources.field")
                return
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as parquet ({reason}); write or fetch the file again") from error


def _hub_rows(source: SourceConfig, reject: Callable[[str], None]) -> Iterator[Document]:
    if source.path is None:
        raise DataError("data.sources: a huggingface source needs path: the name of the dataset")
    for number, record in enumerate(_records(source, source.path), start=1):
        yield from _field(record, source.field, f"{source.path}:{number}", reject)


def _records(source: SourceConfig, path: str) -> Iterator[Any]:
    import datasets

    try:
        saved = Path(path).expanduser()
        if _is_saved(saved):
            yield from _saved(saved, source.split)
        else:
            yield from datasets.load_dataset(path, source.name, split=source.split)
    except DataError:
        raise
    except Exception as error:  # of many kinds: missing, private, offline, corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the datasets library cannot read this: {reason}") from error


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved(folder: Path, split: str) -> Any:
    """Open what `save_to_disk` wrote: a Dataset, or the split of a DatasetDict."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder}: no split {split!r} among {sorted(saved)}; set data.sources.split")
    return saved[split]


def _field(record: Any, field: str, origin: str, reject: Callable[[str], None]) -> Iterator[Document]:
    """Yield the one text of a record, or reject it."""
    if not isinstance(record, dict):
        reject(f"{origin}: expected an object with fields, found {type(record).__name__}")
        return
    try:
        text = _value(record, field)
    except KeyError:
        reject(f"{origin}: no field {field!r} among {sorted(record)}; set data.sources.field")
        return
    if not isinstance(text, str):
        reject(f"{origin}: field {field!r} holds {type(text).__name__}, expected a string")
    elif not _encodable(text):
        reject(f"{origin}: field {field!r} holds half of a surrogate pair, or bytes that are not UTF-8")
    else:
        yield Document(text, origin)


def _value(record: dict[str, Any], field: str) -> Any:
    """Return what stands under a name, or else under a path of names: `data.text` in {"data": {"text": ...}}."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict):
            raise KeyError(field)
        value = value[name]
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
