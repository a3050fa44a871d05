"""Rows and batches. Which rows a step holds depends on the data, the seed and the step alone."""

from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dash_train.data.epochs import Epochs, Reading
from dash_train.data.errors import DataError
from dash_train.data.packing import Ints, Packing
from dash_train.data.shards import TokenShards

IGNORE = -100  # the label that no loss counts
STEPS_AHEAD = 2

Row = dict[str, Tensor]


class RowDataset:
    """The packed rows of a split, `train` or `validation`, of a folder that `prepare` made.

    `weights` are the passes over each source in one epoch (default: one each); `max_passes` and `length_weights` as in
    `Reading`. Rows are numbered by an index that runs on through the epochs; within an epoch they come in a seeded
    order. Memory and the time to start do not grow with the corpus.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        seq: int,
        chunk_size: int,
        weights: Sequence[float] | None = None,
        max_passes: Sequence[float | None] = (),
        length_weights: Sequence[Mapping[int, float]] = (),
        seed: int = 0,
        shards: TokenShards | None = None,
    ) -> None:
        if seq % chunk_size:
            raise DataError(f"train.seq: {seq} is not a multiple of chunk_size {chunk_size}; rows hold whole chunks")
        self.shards = shards or TokenShards(Path(folder) / split)
        if not self.shards.meta.documents:
            raise DataError(f"{Path(folder) / split}: holds no document; give more documents")
        self.seq = seq
        self.chunk_size = chunk_size
        self.weights = list(weights or [1.0] * len(self.shards.meta.sources))
        if len(self.weights) != len(self.shards.meta.sources):
            raise DataError(f"weights: {len(self.weights)} given for {len(self.shards.meta.sources)} sources")
        self._check_weights()
        self.seed = seed
        self.reading = Reading(self.weights, max_passes, length_weights)
        self.epochs = Epochs(self.shards, self.reading, seq=seq, chunk_size=chunk_size, seed=seed)
        self._epoch_starts = [0]

    def summary(self) -> list[str]:
        """Return a line for each source: what it holds, and what the first epoch reads of it."""
        documents, tokens = np.diff(self.shards.source_starts), self.shards.source_tokens
        read = self.epochs.tokens(0)
        return [
            f"{name}: {documents[i]:,} documents, {tokens[i]:,} tokens; weight {self.weights[i]:g}: {read[i]:,} "
            f"tokens of the first epoch, {read[i] / read.sum():.1%}"
            for i, name in enumerate(self.shards.meta.sources)
        ]

    def _check_weights(self) -> None:
        counts = np.diff(self.shards.source_starts).tolist()
        if not any(round(weight * count) for weight, count in zip(self.weights, counts, strict=True)):
            source = int(np.argmax(np.array(self.weights) * counts))
            raise DataError(
                f"data.sources.{source}.weight: {self.weights[source]:g} of {counts[source]} documents is none in an "
                f"epoch; expected at least {1 / counts[source]:.2g}, which is one"
            )

    def rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch."""
        return int(self.epochs.row_starts(epoch)[-1])

    def total_rows(self) -> int | None:
        """Return the rows of all epochs where max_passes ends them, else None."""
        if not self.epochs.limited:
            return None
        epoch = 0
        while not self.epochs.ended(epoch):
            epoch += 1
        return sum(self.rows(number) for number in range(epoch))

    def fill(self, epoch: int = 0) -> float:
        """Return the share of an epoch's row positions that hold a token of a document."""
        return int(self.epochs.tokens(epoch).sum()) / (self.rows(epoch) * self.seq)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the epoch that a row index falls into and its place in that epoch.

        Raises:
            DataError: every source has been read as often as it may be.
        """
        while index >= self._epoch_starts[-1]:
            epoch = len(self._epoch_starts) - 1
            if self.epochs.ended(epoch):
                raise DataError(
                    f"data.sources: all have been read max_passes times after {self._epoch_starts[-1]:,} rows of "
                    f"{self.seq:,} tokens; lower train.steps, or raise max_passes or give another source"
                )
            self._epoch_starts.append(self._epoch_starts[-1] + self.rows(epoch))
        epoch = bisect_right(self._epoch_starts, index) - 1
        return epoch, index - self._epoch_starts[epoch]

    def row_id(self, index: int) -> int:
        """Return the number of the packed row that stands at an index: the index with the shuffling undone."""
        epoch, place = self.locate(index)
        starts = self.epochs.row_starts(epoch)
        first = int(starts[bisect_right(starts, place) - 1])
        return index - place + first + self.epochs.find(epoch, place)[1]

    def row(self, index: int) -> Row:
        """Return the row at an index, four tensors `[seq]`.

        `tokens` (int64): the token ids, the pad id where there is none. `labels` (int64): the next token of the same
        document, also when the next row holds it; -100 for a document's last token, for pads and for what does not
        count in the loss. `document_starts`
        (int32): the position in the row at which the token's document begins, a multiple of chunk_size; the part of
        a split document counts as a document of its own, a pad belongs to the document before it in its chunk, or to
        its own chunk. `real` (bool): false for pads.
        """
        tokens = np.full(self.seq, self.shards.meta.pad_id, dtype=np.int64)
        labels = np.full(self.seq, IGNORE, dtype=np.int64)
        starts = np.arange(self.seq, dtype=np.int32) // self.chunk_size * self.chunk_size
        real = np.zeros(self.seq, dtype=bool)
        packing, pieces = self.pieces(index)
        columns = (packing.position, packing.place, packing.length, packing.cut)
        for at, place, length, cut in zip(*(column[pieces].tolist() for column in columns), strict=True):
            tokens[at : at + length] = self.shards.read(place, length)
            labels[at : at + length - 1 + cut] = self.shards.read_labels(place, length + cut, IGNORE)[1:]
            starts[at : at + -(-length // self.chunk_size) * self.chunk_size] = at
            real[at : at + length] = True
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "document_starts": torch.from_numpy(starts),
            "real": torch.from_numpy(real),
        }

    def pieces(self, index: int) -> tuple[Packing, slice]:
        """Return the block that holds the row at an index, and which of its pieces make up that row."""
        block, row = self.epochs.find(*self.locate(index))
        return block, slice(*block.row_starts[row : row + 2])

    def source_tokens(self, index: int) -> Ints:
        """Return how many tokens of the row at an index are labels, for each source."""
        packing, pieces = self.pieces(index)
        counted = packing.length[pieces] - 1 + packing.cut[pieces]
        return self.epochs.per_source(packing.document[pieces], counted)

    def padding_row(self) -> Row:
        """Return a row without any document, for ranks that have run out of rows."""
        positions = torch.arange(self.seq, dtype=torch.int32)
        return {
            "tokens": torch.full((self.seq,), self.shards.meta.pad_id, dtype=torch.int64),
            "labels": torch.full((self.seq,), IGNORE, dtype=torch.int64),
            "document_starts": positions // self.chunk_size * self.chunk_size,
            "real": torch.zeros(self.seq, dtype=torch.bool),
        }

    def fingerprint(self, rows: int | None = None) -> dict[str, Any]:
        """Return what decides the rows, ready for JSON: two runs that agree on it see the same rows (all of them, also
        after the first `rows`)."""
        return {
            "shards": self.shards.digest(),
            "tokenizer": self.shards.meta.tokenizer_hash,
            "seq": self.seq,
            "chunk_size": self.chunk_size,
            **self.reading.fingerprint(),
            "seed": self.seed,
            "packer_version": self.epochs.version,
        }


class Rows(Protocol):
    """An endless sequence of rows: what a `RowDataset` and a `Mixture` have in common."""

    def row(self, index: int) -> Row: ...

    def row_id(self, index: int) -> int: ...

    def locate(self, index: int) -> tuple[int, int]: ...

    def source_tokens(self, index: int) -> Ints: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: the packed rows of all ranks, how many tokens of each source are labels in them, and the
    micro-batches of this rank (tensors `[micro, seq]`).

    A micro-batch has no `document_starts` when each of its rows is one document.
    """

    step: int
    epoch: int
    rows: list[int]
    source_tokens: list[int]
    micro_batches: list[dict[str, Tensor]]


def step_batches(
    dataset: Rows, *, global_batch_size: int, micro_batch_size: int, rank: int, world: int, start_step: int = 0
) -> Generator[StepBatch, None, None]:
    """Yield the batches of step `start_step`, `start_step` + 1, ... without end, made ahead in a background thread.

    Step s holds the rows at indices s * global_batch_size onwards; `rank` and `world` count data-parallel ranks and
    decide only who reads which of them. Closing the iterator stops the thread.
    """
    accumulation, rest = divmod(global_batch_size, micro_batch_size * world)
    if rest:
        raise DataError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"times {world} data-parallel ranks"
        )

    def make(step: int) -> StepBatch:
        first = step * global_batch_size
        micro_batches = []
        for micro in range(accumulation):
            start = first + (micro * world + rank) * micro_batch_size
            micro_batches.append(_stack([dataset.row(start + i) for i in range(micro_batch_size)]))
        rows = [dataset.row_id(first + i) for i in range(global_batch_size)]
        counted = np.sum([dataset.source_tokens(first + i) for i in range(global_batch_size)], axis=0)
        return StepBatch(step, dataset.locate(first)[0], rows, counted.tolist(), micro_batches)

    def run() -> Generator[StepBatch, None, None]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        try:
            ahead = deque(thread.submit(make, start_step + i) for i in range(STEPS_AHEAD))
            for step in count(start_step + STEPS_AHEAD):
                ahead.append(thread.submit(make, step))
                yield ahead.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

    return run()


def validation_batches(
    dataset: RowDataset, *, micro_batch_size: int, rank: int, world: int, limit_rows: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's micro-batches of the first `limit_rows` rows (default: all), the same ones every time.

    Every rank gets the same number of full micro-batches; rows without labels fill up the last ones.
    """
    rows = dataset.rows(0) if limit_rows is None else min(limit_rows, dataset.rows(0))
    for first in range(0, rows, micro_batch_size * world):
        mine = range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        yield _stack([dataset.row(index) if index < rows else dataset.padding_row() for index in mine])


def _stack(rows: list[Row]) -> dict[str, Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if not batch["document_starts"].any():  # told apart here, where it takes no waiting for the device
        del batch["document_starts"]
    return batch
