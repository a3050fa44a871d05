"""May this run go on from that checkpoint? What a user changes takes effect, or is refused by name."""

import logging
import os
from pathlib import Path
from typing import Any

from dash_train.data.loader import RowDataset
from dash_train.data.mixture import Mixture
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.recipe.schema import Recipe
from dash_train.recipe.values import flat
from dash_train.training import checkpoint
from dash_train.training.checkpoint import TrainState
from dash_train.training.start import Start

SHAPE = (
    "layers",
    "hidden_size",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp_size",
    "tie_embeddings",
    "qk_norm",
    "qkv_bias",
)
ATTENTION = ("attention.type", "attention.chunk_size")  # which a stage may change
DONE = (  # has had its effect before the first step
    "train.seed",
    "init.from",
    "init.keep",
    "data.tokenizer.vocab_size",
    "data.tokenizer.training_sentences",
)
MODEL_DONE = ("model.init_std", "model.attention.initial_density")
CUTS_ROWS = ("data.", "train.seq", "model.attention.chunk_size")
SHARDING = ("parallel.zero_stage", "train.precision", "parallel.offload_optimizer")  # of checkpoints of version 0.1

WAY_OUT = "set it back, or choose another run_dir (init.from and init.keep take over what you name)"

logger = logging.getLogger(__name__)


def check_fit(start: Start, recipe: Recipe, rows: RowDataset | Mixture) -> None:
    """Refuse a checkpoint that does not fit a recipe whose model section is settled; log what a resume changes.

    Raises:
        UserError: names the key, both values, and the way out.
    """
    found, state = start.checkpoint, start.state
    assert found is not None and state is not None
    saved = checkpoint.load_model_config(found)
    if start.resumes or start.stage:
        check_model(found, state, saved, recipe, attention_too=start.resumes)
    if start.resumes:
        check_rows(found, state, recipe, rows.fingerprint(state.rows))
    if start.resumes or start.stage:
        _check_same(("vocab_size",), found, saved, recipe.model)  # once it is not for another tokenizer
        log_changes(state, recipe)
    if "optimizer" in start.keep:
        check_moments(found, state, recipe)


def check_recipe(found: Path, state: TrainState, recipe: Recipe, ranks: int) -> None:
    """Refuse what a resume, or the next stage of a run, could only ignore; before any text is looked at.

    Raises:
        UserError: names the key, both values, and the way out.
    """
    old, new = flat(state.recipe), flat(recipe.model_dump(mode="json", by_alias=True))
    _check_done(DONE, found, old, new)
    if recipe.train.steps < state.step:
        raise UserError(f"{found}: step {state.step} is past train.steps ({recipe.train.steps}); raise train.steps")
    if checkpoint.is_of_deepspeed(found):
        for key in SHARDING:
            if old[key] != new[key]:
                raise UserError(
                    f"{found}: {key} is {old[key]} there and {new[key]} here, and a checkpoint of version 0.1 does not "
                    "go on with another; set it back for one step, which saves one that does"
                )
        if state.world != ranks:
            raise UserError(
                f"{found}: written by {state.world} ranks in the format of version 0.1, this run has {ranks}; start as "
                "many ranks for one step, which saves a checkpoint that any number takes up"
            )


def check_model(found: Path, state: TrainState, saved: ModelConfig, recipe: Recipe, *, attention_too: bool) -> None:
    """Refuse a checkpoint of another model shape (a new stage, or another run, may have another attention), and what
    only new weights would see.

    Raises:
        UserError: names the key, both values, and the way out.
    """
    _check_same(SHAPE + (ATTENTION if attention_too else ()), found, saved, recipe.model)
    old, new = flat(state.recipe), flat(recipe.model_dump(mode="json", by_alias=True))
    same_types = saved.attention.type == recipe.model.attention.type
    if same_types:
        _check_done(MODEL_DONE, found, old, new)
    scale = "model.attention.routing_scale"
    if new[scale] == "auto" and old.get(scale, "auto") != "auto" and same_types:
        raise UserError(f"{found}: {scale} is {old[scale]} there; auto settles it before the first step; {WAY_OUT}")


def _check_same(keys: tuple[str, ...], found: Path, saved: ModelConfig, model: ModelConfig) -> None:
    there, here = flat(saved.model_dump(mode="json")), flat(model.model_dump(mode="json"))
    for key in keys:
        if there[key] != here[key]:
            raise UserError(f"{found}: model.{key} is {there[key]} there and {here[key]} here; {WAY_OUT}")


def _check_done(keys: tuple[str, ...], found: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in keys:
        there = old.get(key, new[key])
        if key == "init.from" and there is not None:
            there = os.path.abspath(there)  # version 0.1 kept paths as they were written
        if there != new[key]:
            raise UserError(
                f"{found}: {key} is {there} there and {new[key]} here; it had its effect before the first step: "
                f"{WAY_OUT}"
            )


def check_moments(found: Path, state: TrainState, recipe: Recipe) -> None:
    """Refuse moments that another optimizer has kept.

    Raises:
        UserError: names both.
    """
    there = state.recipe["optimizer"].get("type", "adamw")
    if there != recipe.optimizer.type:
        raise UserError(
            f"{found}: optimizer.type is {there} there and {recipe.optimizer.type} here, whose moments are others; set "
            "it back, or start from that run with init.keep: [schedule, data] in another run_dir"
        )


def check_rows(found: Path, state: TrainState, recipe: Recipe, fingerprint: dict[str, Any]) -> None:
    """Refuse other rows than the run has been reading.

    Raises:
        UserError: names the keys of the recipe that changed, or says that the sources hold something else.
    """
    there, here = flat(state.fingerprint), flat(fingerprint)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if not differing:
        return
    old, new = flat(state.recipe), flat(recipe.model_dump(mode="json", by_alias=True))
    changed = [key for key in new if key.startswith(CUTS_ROWS) and old.get(key) != new[key]]
    what = "; ".join(f"{key} is {_short(old.get(key))} there and {_short(new[key])} here" for key in changed)
    if not changed:
        what = ", ".join(f"{key} is {there.get(key)} there and {here.get(key)} here" for key in differing)
        what += "; the sources hold something else than before"
    raise UserError(f"{found}: the data differs: {what}; {WAY_OUT}, or make it a stage of its own (stages)")


def log_changes(state: TrainState, recipe: Recipe) -> None:
    """Say what else is another than before: it takes effect."""
    old, new = flat(state.recipe), flat(recipe.model_dump(mode="json", by_alias=True))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            logger.info("resuming with another recipe: %s was %s, is %s", key, old.get(key), new.get(key))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else f"{text[:200]}..."
