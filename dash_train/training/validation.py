"""Loss, bits per byte and density on held-out documents."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dash_train.data.loader import IGNORE, RowDataset, validation_batches
from dash_train.data.rows import by_source
from dash_train.data.tokenizer import Tokenizer
from dash_train.distributed.world import World
from dash_train.model.config import ModelConfig
from dash_train.model.context import Context
from dash_train.recipe.schema import TrainConfig
from dash_train.training.step import to_device
from dash_train.training.totals import Totals


class Validation:
    """The held-out rows of a run, and of each of its sources where there are several."""

    def __init__(self, rows: RowDataset, tokenizer: Tokenizer, train: TrainConfig) -> None:
        self.rows, self.train = rows, train
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes)
        sources = by_source(rows)
        self.sources = sources if len(sources) > 1 else {}

    @torch.no_grad()
    def run(
        self, engine: Any, model: ModelConfig, world: World, context: Context, enter: Callable[[], None]
    ) -> dict[str, Any]:
        """The numbers of a validation line; every rank gets them. `enter` is called before each micro-batch."""
        place = (engine, model, world, context, enter)
        engine.eval()
        totals = self._totals(self.rows, self.train.validation_rows, *place)
        rows = math.ceil(self.train.validation_rows / max(1, len(self.sources)))
        of_sources = {name: self._totals(of, rows, *place) for name, of in self.sources.items()}
        engine.train()
        values: dict[str, Any] = {
            "validation_loss": totals.mean_loss,
            "validation_bits_per_byte": totals.bits_per_byte,
        }
        if of_sources:
            values["source_validation_loss"] = {name: t.mean_loss for name, t in of_sources.items()}
            values["source_validation_bits_per_byte"] = {name: t.bits_per_byte for name, t in of_sources.items()}
        return values | {f"validation_{name}": per_layer for name, per_layer in totals.per_layer().items()}

    def _totals(
        self,
        rows: RowDataset,
        limit: int,
        engine: Any,
        model: ModelConfig,
        world: World,
        context: Context,
        enter: Callable[[], None],
    ) -> Totals:
        totals = Totals(model.layers, model.kv_heads, world.device)
        for micro in validation_batches(
            rows,
            micro_batch_size=self.train.micro_batch_size,
            rank=world.rank // context.size,
            world=world.size // context.size,
            limit_rows=limit,
        ):
            enter()
            labels = context.share(micro["labels"])
            labels = labels[labels != IGNORE]
            outputs = engine(**to_device(micro, world.device))
            totals.add(outputs, labels.numel(), int(self.token_bytes[labels].sum()))
        totals.reduce()
        return totals
