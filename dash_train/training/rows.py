"""The rows of a run from where it stands: a resume with another batch size repeats none and skips none."""

from dataclasses import dataclass
from zlib import crc32

from dash_train.data.loader import Row, Rows
from dash_train.data.packing import Ints


@dataclass(frozen=True)
class _RowsFrom:
    dataset: Rows
    first: int

    def row(self, index: int) -> Row:
        return self.dataset.row(self.first + index)

    def row_id(self, index: int) -> int:
        return self.dataset.row_id(self.first + index)

    def source_tokens(self, index: int) -> Ints:
        return self.dataset.source_tokens(self.first + index)

    def locate(self, index: int) -> tuple[int, int]:
        return self.dataset.locate(self.first + index)


def rows_from(dataset: Rows, first: int) -> Rows:
    """`dataset` as `step_batches` reads it, its row `first` at index 0."""
    return _RowsFrom(dataset, first)


def hash_of(rows: list[int]) -> int:
    """A number by which to see that two steps held the same rows."""
    return crc32(repr(rows).encode())
