"""Epochs: which documents an epoch reads, shuffled and packed in blocks, so that memory does not grow with the corpus.

A corpus of up to `ONE_BLOCK` documents is one block. A larger one deals runs of documents that follow each other in the
shards into blocks of about `BLOCK` documents; each block is shuffled and packed when its first row is asked for. How
many rows every block has follows from how many documents of each size it holds, which one pass over the index tells.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dash_train.data.packing import Ints, Packing, pack, permutation, rows_needed, sizes_of
from dash_train.data.shards import RUN, SCAN, TokenShards

ONE_BLOCK = 2**20  # documents
BLOCK = 2**18
KEPT = 2  # packed blocks


@dataclass(frozen=True)
class Reading:
    """How often the documents of each source are read: `weights` are the passes over it in one epoch.

    No source is read more than `max_passes` times in all (None: without end). `length_weights` are how often a pass
    reads the documents of a source that hold at least so many tokens, {8192: 2.0}; shorter ones are read once.
    """

    weights: Sequence[float]
    max_passes: Sequence[float | None] = ()
    length_weights: Sequence[Mapping[int, float]] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the rows. What is not used is left out: earlier versions knew of weights alone."""
        values: dict[str, Any] = {"weights": list(self.weights)}
        if self.limited:
            values["max_passes"] = list(self.max_passes)
        if self.by_length:
            values["length_weights"] = [{str(least): times for least, times in w.items()} for w in self.length_weights]
        return values

    @property
    def limited(self) -> bool:
        return any(limit is not None for limit in self.max_passes)

    @property
    def by_length(self) -> bool:
        return any(self.length_weights)

    def limit(self, source: int) -> float:
        limit = self.max_passes[source] if self.max_passes else None
        return float("inf") if limit is None else limit


@dataclass(frozen=True)
class _Runs:
    """Documents `first` to `stop`, of one source each, and how many passes over that source came before."""

    first: Ints
    stop: Ints
    passes: Ints

    def __getitem__(self, some: Any) -> "_Runs":
        return _Runs(self.first[some], self.stop[some], self.passes[some])

    def documents(self) -> tuple[Ints, Ints]:
        """Every document in turn, and the number of the run that it is in."""
        counts = self.stop - self.first
        run = np.repeat(np.arange(len(counts)), counts)
        return np.arange(len(run)) + (self.first - np.cumsum(counts) + counts)[run], run


class _Counted(NamedTuple):
    """What is known of an epoch before it is packed: its tokens of each source, and the first row of each block."""

    tokens: Ints
    row_starts: Ints


class Epochs:
    """The endless sequence of epochs over a split, and what each of their blocks holds."""

    def __init__(self, shards: TokenShards, reading: Reading, *, seq: int, chunk_size: int, seed: int) -> None:
        self.shards, self.reading = shards, reading
        self.seq, self.chunk_size, self.seed = seq, chunk_size, seed
        self.counts = np.diff(shards.source_starts)
        read = sum(weight * count for weight, count in zip(reading.weights, self.counts, strict=True))
        self.one_block = max(read, shards.meta.documents) <= ONE_BLOCK
        self.version = 1 if self.one_block else 2
        """Of the rule by which rows are made."""
        # Whole weights read the same documents in every epoch, which pack into the same number of rows.
        whole = all(weight == int(weight) for weight in reading.weights)
        self._alike = self.one_block and whole and not reading.limited and not reading.by_length
        self._counted: dict[int, _Counted] = {}
        self._dealt: tuple[int, _Runs] | None = None
        self._packed: dict[tuple[int, int], Packing] = {}

    def row_starts(self, epoch: int) -> Ints:
        """Return the number of the first row of each block of an epoch and, last, how many rows there are."""
        return self._count(epoch).row_starts

    def tokens(self, epoch: int) -> Ints:
        """Return the tokens that an epoch reads of each source."""
        return self._count(epoch).tokens

    @property
    def limited(self) -> bool:
        """Whether the epochs end some time."""
        limits = (self.reading.limit(source) for source, weight in enumerate(self.reading.weights) if weight)
        return all(limit < float("inf") for limit in limits)

    def ended(self, epoch: int) -> bool:
        """Whether this epoch and all after it are empty."""
        weights = enumerate(self.reading.weights)
        return all(weight * epoch >= self.reading.limit(source) for source, weight in weights if weight)

    def find(self, epoch: int, place: int) -> tuple[Packing, int]:
        """Return the packed block that holds a place of an epoch, and the number of the row there."""
        starts = self.row_starts(epoch)
        number = bisect_right(starts, place) - 1
        packing = self.block(epoch, number)
        return packing, int(packing.order[place - starts[number]])

    def block(self, epoch: int, number: int) -> Packing:
        """Return a block of an epoch, packed; the last few asked for are kept."""
        if (epoch, number) not in self._packed:
            while len(self._packed) >= KEPT:
                del self._packed[next(iter(self._packed))]
            self._packed[epoch, number] = self._pack(epoch, number)
        return self._packed[epoch, number]

    def _pack(self, epoch: int, number: int) -> Packing:
        sources = len(self.counts)
        runs = self._runs(epoch)
        shuffle: tuple[int, ...] = (self.seed, epoch, sources)
        order: tuple[int, ...] = (self.seed, epoch)
        if not self.one_block:
            shuffle, order = (self.seed, epoch, sources, number + 1), (self.seed, epoch, sources + 1, number + 1)
            first, stop = self._bounds(runs)[number : number + 2]
            runs = runs[first:stop]
        documents, run = runs.documents()
        lengths, places = self._look_up(runs)
        if self.reading.by_length:
            times = self._times(documents, lengths, runs.passes[run])
            documents, lengths, places = (np.repeat(values, times) for values in (documents, lengths, places))
        shuffled = permutation(len(documents), *shuffle)
        documents, lengths, places = documents[shuffled], lengths[shuffled], places[shuffled]
        return pack(documents, lengths, places, seq=self.seq, chunk_size=self.chunk_size, order_key=order)

    def _runs(self, epoch: int) -> _Runs:
        """Return what an epoch reads: single documents where it is one block, else runs in the order they are dealt.

        The passes over a source are an endless sequence of permutations, of which each epoch takes the next `weight`
        passes' worth: a weight of 0.5 reads the two halves of one permutation in turn.
        """
        if self._dealt and self._dealt[0] == epoch:
            return self._dealt[1]
        chosen = [_Runs(*np.empty((3, 0), dtype=np.int64))]  # a small weight gives none in some epochs
        for source, weight in enumerate(self.reading.weights):
            runs = self._runs_of(source)
            count = len(runs.first)
            begin, end = (
                round(min(passes * weight, self.reading.limit(source)) * count) for passes in (epoch, epoch + 1)
            )
            for read in range(begin // max(count, 1), -(-end // max(count, 1))):
                order = permutation(count, self.seed, source, read)
                part = runs[order[max(begin - read * count, 0) : end - read * count]]
                chosen.append(_Runs(part.first, part.stop, np.full_like(part.first, read)))
        dealt = _Runs(*(np.concatenate([getattr(r, name) for r in chosen]) for name in ("first", "stop", "passes")))
        if not self.one_block:
            dealt = dealt[permutation(len(dealt.first), self.seed, epoch, len(self.counts))]
            self._dealt = epoch, dealt
        return dealt

    def _runs_of(self, source: int) -> _Runs:
        first, stop = self.shards.source_starts[source : source + 2]
        step = 1 if self.one_block else RUN
        within = np.arange(first // step * step + step, stop, step)
        starts = np.concatenate([np.full(int(first < stop), first), within])
        return _Runs(starts, np.append(starts[1:], stop)[: len(starts)], np.zeros_like(starts))

    def _bounds(self, runs: _Runs) -> Ints:
        """Return the first run of each block and, last, their number."""
        documents = int((runs.stop - runs.first).sum())
        blocks = max(1, -(-documents // BLOCK))
        return np.arange(blocks + 1) * len(runs.first) // blocks

    def _look_up(self, runs: _Runs) -> tuple[Ints, Ints]:
        """Return the tokens of the documents of some runs, and the place of the first one among all tokens."""
        if self.one_block:
            lengths, places = self.shards.whole_index
            return lengths[runs.first], places[runs.first]
        found = [np.empty((2, 0), dtype=np.int64)]
        for first, stop in zip(runs.first.tolist(), runs.stop.tolist(), strict=True):
            number, skip = divmod(first, RUN)
            found.append(np.stack(self.shards.run(number))[:, skip : skip + stop - first])
        lengths, places = np.concatenate(found, axis=1)
        return lengths, places

    def _times(self, documents: Ints, lengths: Ints, passes: Ints) -> Ints:
        """Return how often a pass reads each document: 1.5 is once and twice in turn, half of them twice first."""
        weights = np.ones(len(documents))
        source = np.searchsorted(self.shards.source_starts, documents, side="right") - 1
        for number, by_length in enumerate(self.reading.length_weights):
            least = sorted(by_length)
            factors = np.array([1.0, *(by_length[tokens] for tokens in least)])
            here = source == number
            weights[here] = factors[np.searchsorted(least, lengths[here], side="right")]
        phase = _uniform(documents, self.seed)
        return (np.floor(weights * (passes + 1) + phase) - np.floor(weights * passes + phase)).astype(np.int64)

    def _count(self, epoch: int) -> _Counted:
        epoch = 0 if self._alike else epoch
        if epoch not in self._counted:
            if self.one_block:
                packing = self.block(epoch, 0)
                tokens = self.per_source(packing.document, packing.length)
                self._counted[epoch] = _Counted(tokens, np.array([0, packing.rows]))
            else:
                self._counted[epoch] = self._remembered(epoch) or self._scan(epoch)
        return self._counted[epoch]

    def per_source(self, documents: Ints, tokens: Ints) -> Ints:
        """Sum up tokens of documents for each source."""
        source = np.searchsorted(self.shards.source_starts, documents, side="right") - 1
        return np.bincount(source, tokens, minlength=len(self.counts)).astype(np.int64)

    def _scan(self, epoch: int) -> _Counted:
        """Count the items of each size in every block, in one pass over the index."""
        runs = self._runs(epoch)
        bounds = self._bounds(runs)
        capacity, blocks = self.seq // self.chunk_size, len(bounds) - 1
        block = np.searchsorted(bounds, np.arange(len(runs.first)), side="right") - 1
        in_order = np.argsort(runs.first, kind="stable")
        runs, block = runs[in_order], block[in_order]
        counts = np.zeros(blocks * (capacity + 1), dtype=np.int64)
        tokens = np.zeros(len(self.counts), dtype=np.int64)
        for first in range(0, self.shards.meta.documents, SCAN):
            some = slice(*np.searchsorted(runs.first, (first, first + SCAN)))
            documents, run = runs[some].documents()
            if not len(documents):
                continue
            lengths = self.shards.index(first, first + SCAN)[0][documents - first]
            whole, rest = sizes_of(lengths, self.seq, self.chunk_size)
            times = np.ones_like(lengths)
            if self.reading.by_length:
                times = self._times(documents, lengths, runs.passes[some][run])
            tokens += self.per_source(documents, lengths * times)
            row = block[some][run] * (capacity + 1)
            counts += np.bincount(row + rest, times, minlength=len(counts)).astype(np.int64)
            counts += np.bincount(row + capacity, whole * times, minlength=len(counts)).astype(np.int64)
        rows = [rows_needed(of_block, capacity) for of_block in counts.reshape(blocks, -1)]
        counted = _Counted(tokens, np.cumsum([0, *rows]))
        self._remember(epoch, counted)
        return counted

    def _record(self, epoch: int) -> Path:
        """Where on this machine it is noted how many rows the blocks of an epoch have."""
        made_from = [self.shards.digest(), self.reading.fingerprint(), self.seq, self.chunk_size, self.seed, epoch]
        name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "dash_train" / "rows" / f"{name}.json"

    def _remembered(self, epoch: int) -> _Counted | None:
        try:
            return _Counted(
                *(np.array(values, dtype=np.int64) for values in json.loads(self._record(epoch).read_bytes()))
            )
        except (OSError, ValueError, TypeError):
            return None

    def _remember(self, epoch: int, counted: _Counted) -> None:
        record = self._record(epoch)
        with suppress(OSError):  # without a place to note it, it is counted again
            record.parent.mkdir(parents=True, exist_ok=True)
            unfinished = record.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps([values.tolist() for values in counted]))
            unfinished.rename(record)


def _uniform(documents: Ints, seed: int) -> np.ndarray:
    """Hash document numbers to [0, 1): the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
