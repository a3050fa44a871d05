"""Rows for `launch/benchmark.py train`, and the routing scales at which a model shows a wanted density on them.

An untrained model routes every token elsewhere, which no trained one does. Neighbours are made alike by repeating each
random token id: the more often, the smaller the union factor.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dash_train.data.config import SourceConfig
from dash_train.data.loader import IGNORE
from dash_train.data.sources import read_documents
from dash_train.model.calibration import calibrate_routing_scale
from dash_train.model.transformer import LanguageModel
from dash_train.training.totals import Totals

UNION = (1.2, 1.4)  # where the search for the number of repeats stops
FIRST_REPEAT = 41
SEARCHES = 6
CALIBRATION_TOKENS = 2**18

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Tokens of rows, made row by row: the standard library's bytes, or random ids, each `repeat` times."""

    seq: int
    vocab_size: int
    repeat: int = 1
    text: bool = False
    batch: int = 1

    def micro_batches(self, rank: int = 0) -> Iterator[dict[str, Tensor]]:
        """Without end, as the model wants them: `tokens` and `labels` `[batch, seq]` int64, each row one document."""
        rows = self._text_rows() if self.text else self._random_rows(rank)
        while True:
            tokens = torch.stack([next(rows) for _ in range(self.batch)])
            labels = torch.cat([tokens[:, 1:], torch.full((self.batch, 1), IGNORE)], 1)
            yield {"tokens": tokens, "labels": labels}

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
    """Set every Dash layer's routing scale so that the first micro-batches' density is `density`.

    Made-up rows are all alike; of text, whose rows differ, up to CALIBRATION_TOKENS are looked at.
    """
    model.config.attention.initial_density = density
    count = max(1, CALIBRATION_TOKENS // (rows.seq * rows.batch)) if rows.text else 1
    batches = islice(rows.micro_batches(), count)
    calibrate_routing_scale(model, [{"tokens": batch["tokens"].to(device)} for batch in batches])


def union_factor(model: LanguageModel, rows: Rows, device: torch.device) -> float | None:
    """The mean over the layers, on the first micro-batch."""
    tokens = next(rows.micro_batches())["tokens"].to(device)
    totals = Totals(model.config.layers, model.config.kv_heads, device)
    with torch.no_grad():
        totals.add(model(tokens, labels=torch.full_like(tokens, IGNORE)), tokens.numel())
    if model.context.size > 1:  # each rank has counted its own tokens
        totals.reduce()
    return mean(totals.per_layer()["union_factor"])


def rows_with_locality(model: LanguageModel, seq: int, batch: int, density: float, device: torch.device) -> Rows:
    """Random rows, `batch` at a time, on which the calibrated model's mean union factor is in UNION, or near it.

    Calibrates the model on the way. Repeats are odd: a token's repeats then begin anywhere in a tile, and
    the union factor falls smoothly as 1 + constant / repeats.
    """
    assert model.config.vocab_size is not None
    repeat = FIRST_REPEAT
    for _ in range(SEARCHES):
        rows = Rows(seq, model.config.vocab_size, repeat, batch=batch)
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
