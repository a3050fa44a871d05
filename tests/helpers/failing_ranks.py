"""What the ranks of the failure tests run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash_train.distributed import agreement
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


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """What the user reads; nothing when all is well."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""
