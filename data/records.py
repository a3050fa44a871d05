"""Records of a file in each format, and the text of a record."""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

from dash_train.data.config import FIELD
from dash_train.data.errors import DataError
from dash_train.data.files import File, open_file, open_raw

ROWS_AT_ONCE = 1000
EXTRA = "\0"  # the key of the values of a CSV row for which the header has no name
READ = 2**20  # bytes, or characters of a JSON array, that are read at a time
LONGEST_SIGN = 16  # characters of a number, an escape or a name that may be cut off where reading stopped

Reject = Callable[[str], None]


class Record(NamedTuple):
    """A record and where it stands, which reads `file:line` or `file:row`."""

    values: Any
    origin: object


class TextOf:
    """The text of a record: one of its fields, or several that a template joins.

    A field is a name, or a path of names: `data.text` in {"data": {"text": ...}}, unless it is a name itself. In a
    template every {field} stands for its text, and all else for itself.
    """

    def __init__(self, field: str, template: str | None) -> None:
        self.template = template
        self.fields = [field] if template is None else list(dict.fromkeys(FIELD.findall(template)))

    def of(self, record: Record, reject: Reject) -> str | None:
        """Return the text of a record, or reject the record."""
        values, origin = record
        if not isinstance(values, dict):
            reject(f"{origin}: expected an object with fields, found {type(values).__name__}")
            return None
        texts = {}
        for field in self.fields:
            try:
                texts[field] = _value(values, field)
            except KeyError:
                reject(f"{origin}: no field {field!r} among {sorted(values)}; set data.sources.field")
                return None
            if not isinstance(texts[field], str):
                reject(f"{origin}: field {field!r} holds {type(texts[field]).__name__}, expected a string")
                return None
            if not is_encodable(texts[field]):
                reject(f"{origin}: field {field!r} holds half of a surrogate pair, or bytes that are not UTF-8")
                return None
        if self.template is None:
            return str(texts[self.fields[0]])
        return FIELD.sub(lambda found: str(texts[found[1]]), self.template)


def _value(record: dict[str, Any], field: str) -> Any:
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict):
            raise KeyError(field)
        value = value[name]
    return value


def is_encodable(text: str) -> bool:
    """Whether a text is UTF-8 when it is written: no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Line(NamedTuple):
    """A line of a file, by its number after the first bytes of the file; these are counted where it has to be told."""

    file: File
    first: int
    number: int

    def __str__(self) -> str:
        before, left = 0, self.first
        with open_raw(self.file) as contents:
            while left and (part := contents.read(min(left, READ))):
                before += part.count(b"\n")
                left -= len(part)
        return f"{self.file}:{before + self.number}"


def json_records(file: File, first: int, stop: int | None, reject: Reject) -> Iterator[Record]:
    """Yield the objects of a file of JSON lines that begin at bytes `first` to `stop`, or those of one JSON array."""
    with open_file(file) as lines:
        if first == 0 and is_array(lines):
            yield from _array(lines, str(file))
            return
        if first:
            lines.seek(first - 1)
            first += len(lines.readline()) - 1  # the line that is under way belongs to the part before
        for number, line in enumerate(_lines(lines, stop), start=1):
            if not line.strip():
                continue
            origin = _Line(file, first, number) if first else f"{file}:{number}"
            try:
                yield Record(json.loads(line), origin)
            except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or nested without end
                reject(f"{origin}: not a JSON object ({error})")


def _lines(file: IO[bytes], stop: int | None) -> Iterator[bytes]:
    if stop is None:
        yield from file
    else:
        while file.tell() < stop and (line := file.readline()):
            yield line


def is_array(lines: Any) -> bool:
    """Whether a file is one JSON array of records, and not JSON lines of which the first is another array."""
    beginning = lines.peek(READ).removeprefix(codecs.BOM_UTF8).lstrip()
    return beginning.startswith(b"[") and not re.match(rb"\[[^\n{]*\][ \t\r]*\n\s*\S", beginning)


def _array(file: IO[bytes], name: str) -> Iterator[Record]:
    """Yield the items of a JSON array, no more of which is held than about one item."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    held, line = "", 1

    def problem(what: str) -> DataError:
        return DataError(f"{name}:{line}: not a JSON array of objects ({what}); mend the file, or write JSON lines")

    def fill() -> bool:
        nonlocal held
        try:
            more = text.read(max(READ, len(held)))
        except UnicodeDecodeError as error:
            raise problem(f"not UTF-8: {error.reason}") from error
        held += more
        return bool(more)

    def following() -> str:
        """Drop white space, and return the character that follows it; empty at the end of the file."""
        nonlocal held, line
        while not (left := held.lstrip(" \t\r\n")) and fill():
            pass
        line += held[: len(held) - len(left)].count("\n")
        held = left
        return held[:1]

    def take(expected: str) -> str:
        nonlocal held
        found = following()
        if not found or found not in expected:
            raise problem(f"expected {' or '.join(expected)}, found {found!r}" if found else "cut short")
        held = held[1:]
        return found

    def item() -> Any:
        nonlocal held, line
        while True:
            try:
                values, end = json.JSONDecoder().raw_decode(held)
            except json.JSONDecodeError as error:
                unfinished = error.pos > len(held) - LONGEST_SIGN or error.msg.startswith("Unterminated string")
                if not (unfinished and fill()):
                    raise problem(error.msg) from error
            except RecursionError as error:
                raise problem("nested without end") from error
            else:
                line += held[:end].count("\n")
                held = held[end:]
                return values

    take("[")
    ended = following() == "]" and take("]") == "]"
    while not ended:
        following()
        origin = f"{name}:{line}"
        yield Record(item(), origin)
        ended = take(",]") == "]"
    if following():
        raise problem("it goes on after its end")
    text.detach()


def csv_records(file: File, reject: Reject) -> Iterator[Record]:
    """Yield the rows of a CSV file, whose first line names the fields."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KB
    with open_file(file) as contents:
        # A byte that is not UTF-8 becomes half of a surrogate pair, for which its row alone is rejected.
        lines = io.TextIOWrapper(contents, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(lines, restkey=EXTRA, strict=True)
        try:
            for row in rows:
                if EXTRA in row:
                    reject(f"{file}:{rows.line_num}: more values than the header has names")
                    continue
                yield Record(row, f"{file}:{rows.line_num}")
        except csv.Error as error:
            raise DataError(f"{file}:{rows.line_num}: not CSV ({error}); mend the file") from error


def parquet_records(file: File, fields: list[str], first: int, stop: int | None, reject: Reject) -> Iterator[Record]:
    """Yield the rows of a parquet file, of its row groups `first` to `stop`, with the columns that hold the fields."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ExitStack() as stack:
            opened = file if isinstance(file, Path) else stack.enter_context(open_raw(file))
            table = stack.enter_context(ParquetFile(opened, page_checksum_verification=True))
            names = table.schema_arrow.names
            columns = [field if field in names else field.partition(".")[0] for field in fields]
            if missing := [field for field, column in zip(fields, columns, strict=True) if column not in names]:
                rows = table.metadata.num_rows
                reject(
                    f"{file}: no field {missing[0]!r} among {sorted(names)} in its {rows} rows; set data.sources.field"
                )
                return
            groups = range(table.num_row_groups)[first:stop]
            number = sum(table.metadata.row_group(group).num_rows for group in range(first))
            for batch in table.iter_batches(
                ROWS_AT_ONCE, row_groups=list(groups), columns=list(dict.fromkeys(columns))
            ):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(values, f"{file}:{number}")
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as parquet ({reason}); write or fetch the file again") from error
