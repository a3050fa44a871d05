"""What the ranks of the failure tests run."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash_train.distributed import agreement, watchdog
from dash_train.distributed.world import barrier, init_world
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.training.trainer import Trainer


def collect_refusals(rank: int, path: Path, folder: Path) -> None:
    """Write what this rank of four is told about mistakes that only several ranks can make."""
    recipe = load_recipe(path, ["optimizer.lr=0.001"])
    another = load_recipe(path, ["optimizer.lr=0.002"])
    packages = agreement.package_versions()
    told = {
        "same": refusal(agreement.check_agreement, recipe),
        "another recipe": refusal(agreement.check_agreement, another if rank >= 2 else recipe),
        "context": refusal(Trainer, load_recipe(path, ["parallel.context=3", "train.seq=192"])),
        "batch": refusal(Trainer, load_recipe(path, ["parallel.context=2", "train.micro_batch_size=8"])),
    }
    agreement.package_versions = lambda: {**packages, "torch": f"2.{rank % 2}"}
    told["another package"] = refusal(agreement.check_agreement, recipe)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def hang_at_the_start(rank: int, folder: Path) -> None:
    """Rank 1 never comes out of a phase before the first step; rank 0 is already in the next."""
    dog = watchdog.Watchdog(init_world(), timeout_seconds=600)
    dog.log = folder / f"{rank}.log"
    dog.begin("building the model", limit=2.0)
    if rank == 1:
        time.sleep(120)
    dog.begin("loading the checkpoint", limit=2.0)
    barrier()


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """What the user reads; nothing when all is well."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""
