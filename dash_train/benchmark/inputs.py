"""Rows for `launch/benchmark.py train`, and the routing scales at which a model shows a wanted density on them.

An untrained model routes every token elsewhere, which no trained one does. Neighbours are made alike by repeating each
random token id: the more often, the smaller the union factor.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_train.data.config import SourceConfig
from dash_train.data.loader import IGNORE
from dash_train.data.sources import read_documents
from dash_train.model.calibration import calibrate_routing_scale
from dash_train.model.transformer import LanguageModel
from dash_train.totals import Totals

UNION = (1.2, 1.4)  # where the search for the number of repeats stops
FIRST_REPEAT = 41
SEARCHES = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Tokens of rows, made row by row: the standard library's bytes, or random ids, each `repeat` times."""

    seq: int
    vocab_size: int
    repeat: int = 1
    text: bool = False

    def micro_batches(self, rank: int = 0) -> Iterator[dict[str, Tensor]]:
        """One row after the other without end, as the model wants them: `tokens` and `labels` `[1, seq]` int64."""
        for row in self._text_rows() if self.text else self._random_rows(rank):
            labels = torch.cat([row[1:], torch.full((1,), IGNORE)])
            yield {"tokens": row[None], "labels": labels[None]}

    def _random_rows(self, rank: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        while True:
            ids = torch.randint(self.vocab_size, (-(-self.seq // self.repeat),), generator=generator)
            yield ids.repeat_interleave(self.repeat)[: self.seq]

    def _text_rows(self) -> Iterator[Tensor]:
        while True:
            row = bytearray()
            for document in read_documents(SourceConfig(type="stdlib"), reject=lambda _: None):
                row += document.text.encode()
                while len(row) >= self.seq:
                    yield torch.frombuffer(row[: self.seq], dtype=torch.uint8).long() % self.vocab_size
                    del row[: self.seq]


def set_density(model: LanguageModel, rows: Rows, density: float, device: torch.device) -> None:
    """Set every Dash layer's routing scale so that the first row's density is `density`."""
    model.config.attention.initial_density = density
    calibrate_routing_scale(model, next(rows.micro_batches())["tokens"].to(device))


def union_factor(model: LanguageModel, rows: Rows, device: torch.device) -> float | None:
    """The mean over the layers, on the first row."""
    tokens = next(rows.micro_batches())["tokens"].to(device)
    totals = Totals(model.config.layers, model.config.kv_heads, device)
    with torch.no_grad():
        totals.add(model(tokens, labels=torch.full_like(tokens, IGNORE)), rows.seq)
    if model.context.size > 1:  # each rank has counted its own tokens
        totals.reduce()
    return mean(totals.per_layer()["union_factor"])


def rows_with_locality(model: LanguageModel, seq: int, density: float, device: torch.device) -> Rows:
    """Random rows on which the calibrated model's mean union factor lies in UNION, or as near as the search comes.

    Calibrates the model on the way. Repeats are odd: a token's repeats then begin anywhere in a tile, and
    the union factor falls smoothly as 1 + constant / repeats.
    """
    assert model.config.vocab_size is not None
    repeat = FIRST_REPEAT
    for _ in range(SEARCHES):
        rows = Rows(seq, model.config.vocab_size, repeat)
        set_density(model, rows, density, device)
        union = union_factor(model, rows, device)
        if union is None or UNION[0] <= union <= UNION[1]:
            return rows
        repeat = max(1, round(repeat * (union - 1) / (sum(UNION) / 2 - 1))) | 1
        if repeat == rows.repeat:
            break
    logger.warning("seq %d: the union factor is %.2f, wanted was %.1f to %.1f", seq, union, *UNION)
    return rows


def mean(values: list[float | None]) -> float | None:
    """The mean of the layers that route; None when none does."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
