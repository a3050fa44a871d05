"""Runs that change their ranks, stage, context or precision on the way."""

from pathlib import Path
from typing import Any

from ranks import run_on_ranks

from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training.trainer import Trainer

COUNTED = ("step", "lr", "tokens", "rows_hash", "epoch", "skipped_steps")


def run_leg(recipe: Path, ranks: int, overrides: list[str]) -> None:
    """Train a part of a run on so many ranks; one rank is this process."""
    if ranks == 1:
        Trainer(load_recipe(recipe, overrides)).train()
    else:
        run_on_ranks(ranks, _train, recipe, overrides)


def _train(rank: int, recipe: Path, overrides: list[str]) -> None:
    Trainer(load_recipe(recipe, overrides)).train()


def lines(run_dir: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses, and what is counted at each step."""
    training, _ = read_metrics(run_dir)
    return [line["loss"] for line in training], [{key: line[key] for key in COUNTED} for line in training]
