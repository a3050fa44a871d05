"""Do all ranks run the same thing? A node with another recipe or another version trains a wrong model, or hangs."""

import hashlib
import json
import platform
import socket
from pathlib import Path

from dash_train.distributed.world import gather_objects
from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.recipe.values import flat
from dash_train.tracking.environment import package_versions


def check_agreement(recipe: Recipe) -> None:
    """Compare recipe, package versions and this package's source over all ranks.

    Raises:
        UserError: on every rank, naming a rank, what it has and what rank 0 has.
    """
    facts = _facts(recipe)
    if len(set(gather_objects(hashlib.sha256(json.dumps(facts).encode()).hexdigest()))) == 1:
        return
    first, *others = gather_objects((socket.gethostname(), facts))
    for rank, (host, theirs) in enumerate(others, start=1):
        for name in sorted(theirs.keys() | first[1].keys()):
            if theirs.get(name) != first[1].get(name):
                raise UserError(
                    f"rank {rank} (on {host}) does not run what rank 0 (on {first[0]}) runs: {name} is "
                    f"{theirs.get(name)} there and {first[1].get(name)} here; start all ranks with the same recipe and "
                    "the same packages"
                )


def _facts(recipe: Recipe) -> dict[str, object]:
    packages = {f"the version of {name}": version for name, version in package_versions().items()}
    return {
        # Whether run_dir is one folder is tried with a file (`run_folder.claim`): names say little.
        **flat(recipe.model_dump(mode="json", by_alias=True, exclude={"run_dir"})),
        **packages,
        "the version of python": platform.python_version(),
        "the source of dash_train": _source_digest(),
    }


def _source_digest() -> str:
    """A hash of this package's Python files."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in (root, *(root / name for name in ("data", "model", "kernels"))):
        for path in sorted(folder.resolve().rglob("*.py")):
            digest.update(path.relative_to(folder.resolve()).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
