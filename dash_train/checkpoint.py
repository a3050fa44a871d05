"""Checkpoints that are either complete or absent.

A checkpoint is written to `.tmp-step-N`, every file hashed and synced, and only then renamed to `step-N`; `latest`, the
name of the newest, moves last. A folder without a valid manifest is never read. Layout of `RUN/checkpoints/step-N`:

    manifest.json   format, and the size and SHA-256 of every other file
    state.json      step, tokens, data fingerprint, world size, recipe
    model.json      the model's configuration, resolved routing scales included
    *.pt            DeepSpeed's shards: weights, master weights, moments
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.parallel import World, barrier, gather_objects

FORMAT = 1
MANIFEST = "manifest.json"
MODEL_STATES = "mp_rank_00_model_states.pt"
BF16_SHARD = "bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """What a resume needs besides the engine's shards."""

    step: int
    """Optimizer steps taken, skipped ones included."""
    tokens: int
    """Tokens whose loss was counted so far."""
    skipped_steps: int
    """Steps skipped for a non-finite gradient."""
    fingerprint: dict[str, Any]
    """What the data is made of (`RowDataset.fingerprint`)."""
    world: int
    """Ranks that wrote the shards."""
    recipe: dict[str, Any]
    """The resolved recipe."""


def save(engine: Any, world: World, folder: Path, state: TrainState, model: ModelConfig, keep_last: int) -> Path:
    """Write the checkpoint of `state.step` under `folder`, then drop all but the newest `keep_last`; return its folder.

    Every rank calls it. Each hashes and syncs its share of the files.

    Raises:
        UserError: it could not be written; earlier checkpoints are untouched.
    """
    name = f"step-{state.step:08d}"
    temporary, final = folder / f".tmp-{name}", folder / name
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover)
    barrier()
    try:
        engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
        if world.is_main:
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
            (temporary / "model.json").write_text(model.model_dump_json(indent=1))
        barrier()
        files = sorted(path.name for path in temporary.iterdir())
        mine = {name: _seal(temporary / name) for name in files[world.rank :: world.size]}
        sealed = {name: entry for part in gather_objects(mine) for name, entry in part.items()}
        if world.is_main:
            _write_synced(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": sealed}, indent=1))
            _publish(temporary, final, keep_last)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"{final}: the checkpoint could not be written ({str(error).splitlines()[0]}); {free:.2f} GB are free "
            "there; earlier checkpoints are intact: free some space and run the same command to resume"
        ) from error
    barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None. Incomplete ones are skipped with a warning."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is skipped: %s", candidate, problem)
    return None


def find(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: that of `step`, or the newest.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        found: Path | None = path
    elif step is not None:
        found = path / "checkpoints" / f"step-{step:08d}"
    else:
        found = newest(path / "checkpoints")
    if found is None:
        raise UserError(f"{path}: expected a run folder that holds a complete checkpoint, found none")
    problem = _problem(found)
    if problem:
        raise UserError(f"{found}: not a complete checkpoint: {problem}")
    return found


def load_state(checkpoint: Path) -> TrainState:
    """The training state of a checkpoint."""
    return TrainState(**json.loads((checkpoint / "state.json").read_text()))


def load_model_config(checkpoint: Path) -> ModelConfig:
    """The model's configuration in a checkpoint, its routing scales resolved."""
    return ModelConfig.model_validate_json((checkpoint / "model.json").read_text())


def load_engine(engine: Any, world: World, checkpoint: Path) -> None:
    """Load weights and optimizer state into the engine, once every file has been checked against the manifest."""
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    damaged = [
        name for name in sorted(files)[world.rank :: world.size] if _sha256(checkpoint / name) != files[name]["sha256"]
    ]
    damaged = [name for part in gather_objects(damaged) for name in part]
    if damaged:
        raise UserError(
            f"{checkpoint / damaged[0]}: the content differs from the manifest's hash; the file is damaged: remove the "
            "checkpoint's folder and run the same command to resume from the one before"
        )
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def load_weights(path: str | Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's (or a checkpoint folder's) checkpoint, gathered from its shards, on the CPU."""
    checkpoint = find(path, step)
    state = load_state(checkpoint)
    parallel, is_bf16 = state.recipe["parallel"], state.recipe["train"]["precision"] == "bf16"
    if parallel["zero_stage"] == 0:
        return _load_shard(checkpoint / MODEL_STATES)["module"]
    if parallel["zero_stage"] == 1 and is_bf16 and parallel["offload_optimizer"] == "none":
        return _weights_of_bf16_shards(checkpoint, state.world)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _weights_of_bf16_shards(checkpoint: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Stage 1 in bf16 is DeepSpeed's BF16_Optimizer, whose checkpoints its own zero_to_fp32 refuses.

    A rank's shard holds, for each parameter group, a flat tensor of fp32 weights and where in it lies the rank's part
    of each parameter; the parts of a parameter follow each other by rank.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(ranks):
        shard = _load_shard(checkpoint / BF16_SHARD.format(rank=rank))["optimizer_state_dict"]
        groups = zip(shard["param_slice_mappings"], shard["single_partition_of_fp32_groups"], strict=True)
        for places, flat in groups:
            for name, place in places.items():
                parts.setdefault(name, []).append(flat.detach()[place.start : place.start + place.numel])
    module = _load_shard(checkpoint / MODEL_STATES)["module"]
    whole = {module[name].data_ptr(): torch.cat(found).view_as(module[name]) for name, found in parts.items()}
    return {name: whole[weight.data_ptr()] for name, weight in module.items()}  # tied weights share their memory


def _load_shard(file: Path) -> dict[str, Any]:
    """Mapped: moments, which nobody asks for, are never read.

    The checkpoint's hashes say that it is ours; DeepSpeed pickles more than tensors into it.
    """
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def _problem(checkpoint: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None. Sizes only: hashes are checked when it is loaded."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"its {MANIFEST} is not valid JSON"
    if manifest["format"] != FORMAT:
        return f"it has format {manifest['format']}, this version reads {FORMAT}"
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
    return None


def _publish(temporary: Path, final: Path, keep_last: int) -> None:
    _sync(temporary)
    if final.exists():  # an incomplete folder of that name: a complete one would have been resumed from
        shutil.rmtree(final)
    os.replace(temporary, final)
    folder = final.parent
    _write_synced(folder / ".latest", final.name)
    os.replace(folder / ".latest", folder / "latest")
    _sync(folder)
    complete = [path for path in sorted(folder.glob("step-*")) if _problem(path) is None]
    for old in complete[:-keep_last]:
        shutil.rmtree(old)


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
