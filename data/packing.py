"""Packing: which pieces of which documents make up the rows of an epoch.

Long documents are cut into rows of `seq` tokens; what is left of them, and the short documents, are packed by best-fit
decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830), counted in chunks
because every piece begins on a chunk boundary. Everything follows from the document lengths, the weights, the seed and
the epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Packing:
    """Rows and their pieces. Row r holds the pieces `row_starts[r]` to `row_starts[r + 1]`.

    A piece is the tokens `start` to `start + length` of `document`, which goes on after it where `cut` says so. It
    stands at `position` in its row, and at `place` among all tokens of the split.
    """

    document: Ints
    start: Ints
    place: Ints
    length: Ints
    cut: Bools
    position: Ints
    row_starts: Ints
    order: Ints
    """The row that stands at each place: a seeded permutation."""

    @property
    def rows(self) -> int:
        return len(self.order)


def pack(
    documents: Ints, lengths: Ints, places: Ints, *, seq: int, chunk_size: int, order_key: tuple[int, ...]
) -> Packing:
    """Pack documents, given in a shuffled order with their tokens and the place of the first one, into rows."""
    number, start, length, cut = _cut(lengths, seq)
    row, chunk = best_fit(-(-length // chunk_size), seq // chunk_size)
    by_row = np.argsort(row, kind="stable")
    rows = int(row.max()) + 1 if len(row) else 0
    number, start = number[by_row], start[by_row]
    return Packing(
        document=documents[number],
        start=start.astype(np.int32),
        place=places[number] + start,
        length=length[by_row].astype(np.int32),
        cut=cut[by_row],
        position=(chunk[by_row] * chunk_size).astype(np.int32),
        row_starts=np.searchsorted(row[by_row], np.arange(rows + 1)),
        order=permutation(rows, *order_key),
    )


def permutation(count: int, *key: int) -> Ints:
    """Return a permutation of `count` that depends on the key alone: numpy keeps this raw stream fixed (NEP 19)."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def _cut(lengths: Ints, seq: int) -> tuple[Ints, Ints, Ints, Bools]:
    """Cut documents into pieces of at most `seq` tokens: the number of the document, start, length, does it go on."""
    pieces = -(-lengths // seq)
    number = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(number)) - (np.cumsum(pieces) - pieces)[number]) * seq
    left = lengths[number] - start
    return number, start, np.minimum(left, seq), left > seq


def sizes_of(lengths: Ints, seq: int, chunk_size: int) -> tuple[Ints, Ints]:
    """Return, for each document, the whole rows it is cut into and the chunks that what is left of it takes."""
    whole, rest = np.divmod(lengths, seq)
    return whole, -(-rest // chunk_size)


class _Deal(NamedTuple):
    """`items` items of `size` chunks go into rows that have `room` chunks left, `fits` to a row, in order. `rows` have
    that room; they are new ones where `new`."""

    size: int
    items: int
    room: int
    fits: int
    rows: int
    new: bool


def best_fit(sizes: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Best-fit decreasing: return the row and the offset within it of every item, `sizes` <= `capacity`."""
    row, offset = np.empty_like(sizes), np.empty_like(sizes)
    with_room: dict[int, list[Ints]] = {}  # rows by the room that they have left
    largest_first = np.argsort(-sizes, kind="stable")
    dealt = rows = 0
    for deal in _deals(np.bincount(sizes, minlength=capacity + 1), capacity):
        if deal.new:
            candidates = np.arange(rows, rows + deal.rows)
            rows += deal.rows
        else:
            candidates = np.concatenate(with_room.pop(deal.room))
        items = largest_first[dealt : dealt + deal.items]
        dealt += deal.items
        taken = np.arange(deal.items)
        row[items] = candidates[taken // deal.fits]
        offset[items] = capacity - deal.room + taken % deal.fits * deal.size
        first = 0
        for room, count in _rooms_after(deal):
            if room and count:
                with_room.setdefault(room, []).append(candidates[first : first + count])
            first += count
    return row, offset


def rows_needed(counts: Ints, capacity: int) -> int:
    """Return the number of rows that best-fit decreasing takes for `counts[size]` items of each size."""
    return sum(deal.rows for deal in _deals(counts, capacity) if deal.new)


def _deals(counts: Ints, capacity: int) -> Iterator[_Deal]:
    """Best-fit decreasing, in which items of one size and rows with the same room left are dealt with together: so the
    time grows with the number of distinct sizes rather than of items."""
    with_room: dict[int, int] = {}  # how many rows have this much room left
    rooms: list[int] = []  # its keys, ascending
    for size in range(capacity, 0, -1):
        items = int(counts[size])
        while items:
            best = bisect_left(rooms, size)
            if new := best == len(rooms):
                room = capacity
                rows = -(-items // (room // size))
            else:
                room = rooms.pop(best)
                rows = with_room.pop(room)
            fits = room // size
            deal = _Deal(size, min(items, fits * rows), room, fits, rows, new)
            for left, count in _rooms_after(deal):
                if left and count:
                    if left not in with_room:
                        insort(rooms, left)
                    with_room[left] = with_room.get(left, 0) + count
            items -= deal.items
            yield deal


def _rooms_after(deal: _Deal) -> list[tuple[int, int]]:
    """The room that its rows have left, and how many have it: full ones, the last one begun, untouched ones."""
    full, rest = divmod(deal.items, deal.fits)
    return [
        (deal.room - deal.fits * deal.size, full),
        (deal.room - rest * deal.size, int(rest > 0)),
        (deal.room, deal.rows - full - (rest > 0)),
    ]
