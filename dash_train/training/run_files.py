"""What a run says of itself when it starts and ends: files in its folder, a line, a figure."""

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dash_train.data.loader import RowDataset
from dash_train.data.mixture import Mixture
from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.tracking.environment import write_environment
from dash_train.tracking.plot import plot_run
from dash_train.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


def write_run_files(run_dir: Path, recipe: Recipe, deepspeed_config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write recipe, DeepSpeed configuration, tokenizer and environment into a run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe.save(run_dir / "recipe.yaml")
    (run_dir / "ds_config.json").write_text(json.dumps(deepspeed_config, indent=1) + "\n")
    tokenizer.save(run_dir / "tokenizer")
    write_environment(run_dir)


def announce(recipe: Recipe, steps: int, step: int, parameters: int, rows: RowDataset | Mixture) -> None:
    """Say how a run of so many steps is spread over the ranks, and where it stands."""
    train, shared, ranks = recipe.train, recipe.parallel.context, dist.get_world_size()
    logger.info(
        "%s parameters; a step is %d rows of %d tokens: %d rank(s)%s x %d micro-batch(es) of %d; rows are %.1f %% "
        "full; step %d of %d",
        f"{parameters:,}",
        train.global_batch_size,
        train.seq,
        ranks,
        f", {shared} to a row," if shared > 1 else "",
        train.micro_batches(ranks, shared),
        train.micro_batch_size,
        100 * rows.fill(),
        step,
        steps,
    )


def draw(run_dir: Path, tracker: Tracker, step: int) -> None:
    """Draw a run's figure; one that cannot be drawn, as without metrics or space, ends no run."""
    try:
        figure = plot_run(run_dir)
        tracker.log_figure(figure, step)
        logger.info("figure: %s", figure)
    except (UserError, OSError) as error:
        logger.warning("no figure: %s", error)
