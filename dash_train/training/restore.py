"""A checkpoint's weights and moments into an engine, whatever ranks and stage have written it."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from dash_train.errors import UserError
from dash_train.model.calibration import set_routing_scales
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import Recipe
from dash_train.training import checkpoint, deepspeed_format
from dash_train.training.checkpoint import TrainState, is_of_deepspeed
from dash_train.training.ema import EMA, Ema
from dash_train.training.model_state import WEIGHT, Piece, restore
from dash_train.training.progress import Progress
from dash_train.training.start import Start
from dash_train.training.tensor_files import TensorFiles

logger = logging.getLogger(__name__)

NEW_IN_DASH = "chunk_query"  # full attention that becomes Dash has none yet: a summary is the mean key


def take_up(start: Start, engine: Any, recipe: Recipe, progress: Progress) -> None:
    """Go on from a checkpoint that fits: this run's newest, that of the stage before, or another run's. Every rank
    calls it.

    Raises:
        UserError: a weight has another shape, or is not there.
    """
    found, state, config = start.checkpoint, start.state, engine.module.config
    assert found is not None and state is not None
    saved = checkpoint.load_model_config(found)
    # Scales that were settled or steered go on, unless the recipe has others, or the layers another attention.
    before = ModelConfig.model_validate(state.recipe["model"]).attention.routing_scale
    if recipe.model.attention.routing_scale in ("auto", before) and config.attention.type == saved.attention.type:
        take_scales(engine.module, saved)
    load_checkpoint(engine, found, state, moments="optimizer" in start.keep)
    progress.go_on_from(state, recipe.train.seq, start.keep)
    if start.resumes:
        logger.info("resuming from %s", found)
    elif start.stage:
        logger.info("stage %d begins, from %s", start.stage + 1, found)
    else:
        logger.info("starting from %s, with its %s", found, ", ".join(start.keep))


def take_scales(model: LanguageModel, saved: ModelConfig) -> None:
    """Give a model the routing scales of another configuration."""
    model.config.attention.routing_scale = saved.attention.routing_scale
    set_routing_scales(model, model.config)


def load_checkpoint(engine: Any, found: Path, state: TrainState, *, moments: bool) -> None:
    """Load a sound checkpoint's weights and, with `moments`, optimizer state. Every rank calls it.

    Raises:
        UserError: a weight has another shape, or is not there.
    """
    if is_of_deepspeed(found):
        deepspeed_format.load_engine(engine, found)
        return
    files = TensorFiles(found)

    def read(piece: Piece, kind: str) -> Tensor | None:
        parameter = files.parameters.get(piece.name)
        if parameter is None and piece.name.endswith(NEW_IN_DASH):
            return None
        if parameter is None or tuple(parameter.shape) != piece.shape:
            there = f"has shape {parameter.shape}" if parameter else "is not"
            raise UserError(f"{found}: {piece.name} {there} there, the recipe's model needs {list(piece.shape)}")
        return files.read(piece.name, kind, piece.start, piece.size) if kind in parameter.kinds else None

    own = {name for name, _ in engine.module.named_parameters()}
    if extra := sorted(name for name in files.parameters.keys() - own if not name.endswith(NEW_IN_DASH)):
        raise UserError(f"{found}: {extra[0]} has no place in the recipe's model; set its model section as it was")
    kept = tuple(sorted(files.kinds - {WEIGHT, EMA})) if moments else ()
    restore(engine, read, (WEIGHT, *kept), state.optimizer_steps if moments else 0)


def load_ema(ema: Ema, found: Path) -> None:
    """Load the averages of a checkpoint; where it keeps none, they begin with the weights."""
    if is_of_deepspeed(found):
        return
    files = TensorFiles(found)
    for piece in ema.pieces:
        if piece.name in files.parameters and EMA in files.parameters[piece.name].kinds:
            ema.averages[piece.name].copy_(files.read(piece.name, EMA, piece.start, piece.size))
