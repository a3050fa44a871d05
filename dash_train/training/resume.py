"""May this run go on from that checkpoint?"""

import logging
from pathlib import Path
from typing import Any

from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.recipe.load import flat
from dash_train.recipe.schema import Recipe
from dash_train.training.checkpoint import TrainState

SHAPE = (
    "layers",
    "hidden_size",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp_size",
    "vocab_size",
    "tie_embeddings",
    "qk_norm",
    "attention.type",
    "attention.chunk_size",
)
SHARDING = ("parallel.zero_stage", "train.precision")

logger = logging.getLogger(__name__)


def check_resumable(
    checkpoint: Path,
    state: TrainState,
    saved_model: ModelConfig,
    recipe: Recipe,
    model: ModelConfig,
    fingerprint: dict[str, Any],
    ranks: int,
) -> None:
    """Refuse a checkpoint of another model shape, other data or another sharding; log what else changed.

    Raises:
        UserError: names what differs, both values, and the way out.
    """
    way_out = "set it back, or choose another run_dir (init.from takes over weights alone)"
    saved, current = flat(saved_model.model_dump(mode="json")), flat(model.model_dump(mode="json"))
    for key in SHAPE:
        if saved[key] != current[key]:
            raise UserError(f"{checkpoint}: model.{key} is {saved[key]} there and {current[key]} here; {way_out}")
    saved_data, data = flat(state.fingerprint), flat(fingerprint)
    for key in sorted(saved_data.keys() | data.keys()):
        if saved_data.get(key) != data.get(key):
            raise UserError(
                f"{checkpoint}: the data differs: {key} is {saved_data.get(key)} there and {data.get(key)} here; "
                f"{way_out}"
            )
    old = flat(state.recipe)
    new = flat(recipe.model_dump(mode="json", by_alias=True))
    for key in SHARDING:
        if old[key] != new[key]:
            raise UserError(f"{checkpoint}: {key} is {old[key]} there and {new[key]} here; {way_out}")
    if state.world != ranks:
        raise UserError(f"{checkpoint}: written by {state.world} ranks, this run has {ranks}; start as many ranks")
    if state.step > recipe.train.steps:
        raise UserError(
            f"{checkpoint}: step {state.step} is past train.steps ({recipe.train.steps}); raise train.steps"
        )
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            logger.info("resuming with another recipe: %s was %s, is %s", key, old.get(key), new.get(key))
