"""Checkpoints made from others: averages, moving averages, weights alone in one file. They hold no moments."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from dash_train.errors import UserError
from dash_train.training import checkpoint
from dash_train.training.checkpoint import FORMAT, MANIFEST, MODEL, OUTPUT, STATE, TOKENIZER
from dash_train.training.initial import tokenizer_of
from dash_train.training.model_state import WEIGHT
from dash_train.training.saving import seal, write_synced
from dash_train.training.tensor_files import INDEX, Index, Parameter, dump_index, file_of, write


def sound_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, newest first, all of them sound.

    Raises:
        UserError: there are fewer, or one is damaged.
    """
    found = checkpoint.checkpoints_in(run / "checkpoints")[:count]
    if len(found) < count:
        there = ", ".join(str(checkpoint.step_of(path)) for path in reversed(found)) or "none"
        raise UserError(f"{run}: {count} checkpoints are wanted, there are those of: {there} (checkpoint.keep_last)")
    for path in found:
        if problem := checkpoint.problem_of(path):
            raise UserError(f"{path}: not a complete checkpoint: {problem}")
    return found


def average(run: Path, out: Path, last: int) -> list[Path]:
    """Write the mean weights of a run's newest `last` checkpoints as a checkpoint folder; return those averaged.

    Raises:
        UserError: there are not as many, they are of different models, or `out` exists.
    """
    found = sound_checkpoints(run, last)
    mean: dict[str, Tensor] = {}
    for count, path in enumerate(found, start=1):
        weights = checkpoint.load_weights(path)
        if mean and {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in mean.items()}:
            raise UserError(f"{path}: is of another model shape than {found[0]}")
        for name, weight in weights.items():
            mean[name] = weight.float().clone() if count == 1 else mean[name].lerp_(weight.float(), 1 / count)
    write_weights(out, found[0], mean)
    return found


def convert(path: Path, out: Path, *, step: int | None = None, kind: str = WEIGHT) -> Path:
    """Write the weights of a checkpoint, of whatever version and number of ranks, or its `ema`, as a checkpoint folder
    of one file; return the checkpoint.

    Raises:
        UserError: there is no sound one, it holds nothing of that kind, or `out` exists.
    """
    found = checkpoint.find(path, step)
    write_weights(out, found, checkpoint.load_weights(found, kind=kind))
    return found


def write_weights(out: Path, like: Path, weights: dict[str, Tensor]) -> None:
    """Write weights as a checkpoint folder without moments, of the model, tokenizer and counts of another."""
    model = checkpoint.load_model_config(like)
    own = {name: weight for name, weight in weights.items() if name != OUTPUT or not model.tie_embeddings}
    state = replace(checkpoint.load_state(like), world=1, optimizer_steps=0)
    file = file_of(0)
    places = {
        name: Parameter(shape=list(weight.shape), kinds=[WEIGHT], pieces=[(file, 0, weight.numel())])
        for name, weight in own.items()
    }
    with _appears_whole(out) as folder:
        write(folder / file, {f"{WEIGHT}/{name}": weight.float().reshape(-1) for name, weight in own.items()})
        write_synced(folder / INDEX, dump_index(Index(parameters=places)))
        write_synced(folder / STATE, json.dumps(asdict(state), indent=1))
        write_synced(folder / MODEL, model.model_dump_json(indent=1))
        files = {name: seal(folder / name) for name in (file, INDEX, STATE, MODEL)}
        write_synced(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        shutil.copytree(tokenizer_of(like), folder / TOKENIZER)


@contextmanager
def _appears_whole(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` at the end, and is removed after an error."""
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = out.absolute().with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    try:
        yield folder
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
