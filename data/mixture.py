"""Mixtures: rows of several sources, each row of one of them, in shares that may change over the run.

Which source row i is of follows from where i times the golden ratio falls between 0 and 1: so every stretch of rows has
nearly the right shares, and how many rows of a source came before can be counted without going through them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from dash_train.data.errors import DataError
from dash_train.data.loader import Row, RowDataset
from dash_train.data.packing import Ints

MIXTURE_VERSION = 1  # rises when the same shares give other rows
WHOLE = 2**32
STEP = 2654435769  # WHOLE over the golden ratio
END = 2**48  # rows: more than any run reads


class _Stage(NamedTuple):
    """From row `first` on, source s has the rows whose place is between `bounds[s]` and `bounds[s + 1]`, of WHOLE;
    `before[s]` of its rows came earlier."""

    first: int
    bounds: list[int]
    before: list[int]

    def rows_before(self, row: int, source: int) -> int:
        """Return how many rows of a source there are before `row`."""
        low, high = self.bounds[source : source + 2]
        here = places_below(high, row) - places_below(low, row)
        return self.before[source] + here - (places_below(high, self.first) - places_below(low, self.first))

    def row_at(self, source: int, count: int) -> int:
        """Return the first row before which there are `count` rows of a source."""
        low, high = self.first, END
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.rows_before(middle, source) >= count else (middle + 1, high)
        return low


class Mixture:
    """The rows of several sources of a split, mixed; it is read like a `RowDataset`.

    `stages` are the first row and the weights of each stage, the first of which begins at row 0. Weights are shares of
    the tokens or documents, as `weight_by` says, relative to each other. A source that has been read `max_passes` times
    gives nothing from then on, and the others all.
    """

    def __init__(
        self, sources: Sequence[RowDataset], stages: Sequence[tuple[int, Sequence[float]]], weight_by: str
    ) -> None:
        self.sources = sources
        self.shards, self.seq, self.chunk_size = sources[0].shards, sources[0].seq, sources[0].chunk_size
        self.weight_by = weight_by
        self.given = [(first, list(weights)) for first, weights in stages]
        amounts = self.shards.source_tokens if weight_by == "tokens" else np.diff(self.shards.source_starts)
        read = [float(source.epochs.tokens(0).sum()) for source in sources]
        # What a pass reads of a source is more than it holds where long documents are read more often.
        passes = [tokens / held for tokens, held in zip(read, self.shards.source_tokens, strict=True)]
        self._rows_of_one = [
            source.rows(0) / (amount * times)
            for source, amount, times in zip(sources, amounts.tolist(), passes, strict=True)
        ]
        self._stages: list[_Stage] = []
        self.end = self._plan()

    def _plan(self) -> int:
        """Lay out the stages, with one more wherever a source is used up; return the row at which all are."""
        limits = [source.total_rows() for source in self.sources]
        before = [0] * len(self.sources)
        for number, (first, weights) in enumerate(self.given):
            end = self.given[number + 1][0] if number + 1 < len(self.given) else END
            while first < end:
                left = [
                    weight * rows if limit is None or used < limit else 0.0
                    for weight, rows, limit, used in zip(weights, self._rows_of_one, limits, before, strict=True)
                ]
                if not any(left):
                    return first
                sums = [0.0, *accumulate(left)]
                stage = _Stage(first, [round(WHOLE * share / sums[-1]) for share in sums], before)
                self._stages.append(stage)
                used_up = [
                    stage.row_at(source, limit)
                    for source, limit in enumerate(limits)
                    if limit is not None and left[source]
                ]
                first = min([end, *used_up])
                before = [stage.rows_before(first, source) for source in range(len(before))]
        return END

    def _find(self, index: int) -> tuple[int, int]:
        """Return the source of a row and the index of the row in it."""
        if index >= self.end:
            raise DataError(
                f"data.sources: all have been read max_passes times after {self.end:,} rows of {self.seq:,} tokens; "
                "lower train.steps, or raise max_passes or give another source"
            )
        stage = self._stage(index)
        source = bisect_right(stage.bounds, index * STEP % WHOLE) - 1
        return source, stage.rows_before(index, source)

    def _stage(self, index: int) -> _Stage:
        return self._stages[bisect_right([stage.first for stage in self._stages], index) - 1]

    def row(self, index: int) -> Row:
        """Return the row at an index, as `RowDataset.row` does."""
        source, place = self._find(index)
        return self.sources[source].row(place)

    def row_id(self, index: int) -> int:
        """Return a number of the packed row that stands at an index."""
        source, place = self._find(index)
        return self.sources[source].row_id(place) * len(self.sources) + source

    def locate(self, index: int) -> tuple[int, int]:
        """Return how many passes over every source are done at an index, and the index."""
        stage = self._stage(index)
        return min(
            source.locate(max(stage.rows_before(index, number) - 1, 0))[0] for number, source in enumerate(self.sources)
        ), index

    def source_tokens(self, index: int) -> Ints:
        """Return how many tokens of the row at an index are labels, for each source."""
        source, place = self._find(index)
        return self.sources[source].source_tokens(place)

    def rows(self, epoch: int) -> int:
        """Return the number of rows of a pass over every source."""
        return sum(source.rows(epoch) for source in self.sources)

    def fill(self, epoch: int = 0) -> float:
        """Return the share of row positions that hold a token, in a pass over every source."""
        return sum(source.fill(epoch) * source.rows(epoch) for source in self.sources) / self.rows(epoch)

    def summary(self) -> list[str]:
        """Return a line for each source: what it holds, and its share of the rows in each stage."""
        documents, tokens = np.diff(self.shards.source_starts), self.shards.source_tokens
        lines = []
        for number, name in enumerate(self.shards.meta.sources):
            shares = [
                f"{(stage.bounds[number + 1] - stage.bounds[number]) / WHOLE:.1%} of the rows"
                + (f" from row {stage.first:,} on" if stage.first else "")
                for stage in self._stages
            ]
            lines.append(f"{name}: {documents[number]:,} documents, {tokens[number]:,} tokens; {', '.join(shares)}")
        return lines

    def fingerprint(self, rows: int | None = None) -> dict[str, Any]:
        """Return what decides the first `rows` rows (default: all): stages that are still to come may change."""
        begun = [stage for stage in self.given if rows is None or stage[0] < max(rows, 1)]
        values = self.sources[0].fingerprint()
        values["weights"] = [[first, *weights] for first, weights in begun]
        for name in ("max_passes", "length_weights"):
            whole = [source.reading.fingerprint().get(name) for source in self.sources]
            if any(whole):
                values[name] = whole
        return {**values, "weight_by": self.weight_by, "mixture_version": MIXTURE_VERSION}


def places_below(bound: int, rows: int) -> int:
    """Return how many of the first `rows` rows have a place below `bound`: i * STEP mod WHOLE < bound.

    That is so where taking `bound` off changes the quotient, so two sums of quotients tell it.
    """
    return quotients(rows, WHOLE, STEP, 0) - quotients(rows, WHOLE, STEP, -bound)


def quotients(count: int, modulus: int, step: int, start: int) -> int:
    """Return the sum of (start + i * step) // modulus over i < count, in the time of Euclid's algorithm.

    Whole multiples of the modulus are taken out; what is left are points below a line, which are counted along the
    other axis, where step and modulus change places.
    """
    total = 0
    while count:
        total += start // modulus * count + step // modulus * (count * (count - 1) // 2)
        start, step = start % modulus, step % modulus
        highest = start + count * step
        count, start = divmod(highest, modulus)
        modulus, step = step, modulus
    return total
