"""Packing: which pieces of which documents make up the rows of an epoch.

Long documents are cut into rows of `seq` tokens; what is left of them, and the short documents, are packed by best-fit
decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830), counted in chunks
because every piece begins on a chunk boundary. Everything follows from the document lengths, the weights, the seed and
the epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PACKER_VERSION = 1

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The rows of one epoch. Row r holds the pieces `row_starts[r]` to `row_starts[r + 1]`.

    A piece is the tokens `start` to `start + length` of `document`, and stands at `position` in its row.
    """

    document: Ints
    start: Ints
    length: Ints
    position: Ints
    row_starts: Ints
    order: Ints
    """The row that stands at each place of the epoch: a seeded permutation."""

    @property
    def rows(self) -> int:
        return len(self.order)


def pack_epoch(
    lengths: Ints, sources: Ints, *, seq: int, chunk_size: int, weights: Sequence[float], seed: int, epoch: int
) -> Packing:
    """Pack one epoch. `lengths` and `sources` are `[documents]`; `weights` holds the passes over each source."""
    documents = _documents_of_epoch(sources, weights, seed, epoch)
    document, start, length = _cut(documents, lengths, seq)
    row, chunk = best_fit(-(-length // chunk_size), seq // chunk_size)
    by_row = np.argsort(row, kind="stable")
    rows = int(row.max()) + 1 if len(row) else 0
    return Packing(
        document=document[by_row],
        start=start[by_row],
        length=length[by_row],
        position=chunk[by_row] * chunk_size,
        row_starts=np.searchsorted(row[by_row], np.arange(rows + 1)),
        order=permutation(rows, seed, epoch),
    )


def permutation(count: int, *key: int) -> Ints:
    """Return a permutation of `count` that depends on the key alone: numpy keeps this raw stream fixed (NEP 19)."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def _documents_of_epoch(sources: Ints, weights: Sequence[float], seed: int, epoch: int) -> Ints:
    """Return the documents that an epoch reads, shuffled.

    The passes over a source are an endless sequence of permutations, of which each epoch takes the next `weight`
    passes' worth: a weight of 0.5 reads the two halves of one permutation in turn.
    """
    chosen = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        count = len(members)
        first, last = round(epoch * weight * count), round((epoch + 1) * weight * count)
        for read in range(first // max(count, 1), -(-last // max(count, 1))):
            order = permutation(count, seed, source, read)
            chosen.append(members[order[max(first - read * count, 0) : last - read * count]])
    documents = np.concatenate([np.empty(0, dtype=np.int64), *chosen])  # a small weight gives none in some epochs
    return documents[permutation(len(documents), seed, epoch, len(weights))]


def _cut(documents: Ints, lengths: Ints, seq: int) -> tuple[Ints, Ints, Ints]:
    """Cut the documents into pieces of at most `seq` tokens: document, start and length of each."""
    pieces = -(-lengths[documents] // seq)
    document = np.repeat(documents, pieces)
    first_piece = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - np.repeat(first_piece, pieces)) * seq
    return document, start, np.minimum(lengths[document] - start, seq)


def best_fit(sizes: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Best-fit decreasing: return the row and the offset within it of every item, `sizes` <= `capacity`.

    Items of one size, and rows with the same room left, are dealt with together, so that the time grows with the
    number of distinct sizes rather than of items.
    """
    row, offset = np.empty_like(sizes), np.empty_like(sizes)
    rows = 0
    with_room: dict[int, Ints] = {}  # rows by the room that they have left
    rooms: list[int] = []  # its keys, ascending

    def put_back(room: int, some: Ints) -> None:
        if room in with_room:
            with_room[room] = np.concatenate([with_room[room], some])
        elif room and len(some):
            with_room[room] = some
            insort(rooms, room)

    largest_first = np.argsort(-sizes, kind="stable")
    for items in np.split(largest_first, np.flatnonzero(np.diff(sizes[largest_first])) + 1):
        while len(items):
            size = int(sizes[items[0]])
            best = bisect_left(rooms, size)
            if best < len(rooms):
                room = rooms.pop(best)
                candidates = with_room.pop(room)
            else:
                room = capacity
                candidates = np.arange(rows, rows - (-len(items) // (room // size)))
                rows += len(candidates)
            fits = room // size
            taken = np.arange(min(len(items), fits * len(candidates)))
            row[items[taken]] = candidates[taken // fits]
            offset[items[taken]] = capacity - room + taken % fits * size
            items = items[len(taken) :]
            full, rest = divmod(len(taken), fits)
            put_back(room - fits * size, candidates[:full])
            put_back(room - rest * size, candidates[full : full + (rest > 0)])
            put_back(room, candidates[full + (rest > 0) :])
    return row, offset
