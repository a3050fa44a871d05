"""What the ranks of the run folder tests run."""

import json
import os
from pathlib import Path

from failing_ranks import refusal

from dash_train.distributed.world import init_world
from dash_train.recipe.load import load_recipe
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer


def collect_folder_refusals(rank: int, path: Path, folder: Path) -> None:
    """Write what this rank of two is told of folders that the ranks see differently, and what it resumes from."""
    listed = checkpoint.checkpoints_in
    checkpoint.checkpoints_in = lambda folder: listed(folder)[1:] if rank else listed(folder)
    told = {"stale": str(checkpoint.newest(folder / "run" / "checkpoints", init_world()))}
    os.chdir(folder / f"node-{rank}")
    told["not shared"] = refusal(Trainer, load_recipe(path, ["run_dir=elsewhere"]))
    told["left"] = str([str(path) for path in Path().rglob("*") if path.is_file()])
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
