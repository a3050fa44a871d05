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
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from dash_train.distributed.world import World, barrier, from_a_collective, from_main, gather_objects
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.json"
MODEL_STATES = "mp_rank_00_model_states.pt"
BF16_SHARD = "bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
NAME = re.compile(r"step-(\d{8,})")
UNFINISHED, DISCARDED = ".tmp-step-", ".old-step-"  # being written, and being removed

logger = logging.getLogger(__name__)


class Entry(BaseModel):
    """What the manifest says of a file."""

    size: int
    sha256: str


class Manifest(BaseModel):
    format: int
    files: dict[str, Entry]


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
    rows: int
    """Rows of the training set read so far."""
    source_tokens: list[int] | None = None
    """`tokens` by source; earlier versions did not count them."""


def save(engine: Any, world: World, folder: Path, state: TrainState, model: ModelConfig, keep_last: int) -> Path:
    """Write the checkpoint of `state.step` under `folder`, then drop all but the newest `keep_last`; return its folder.

    Every rank calls it. Each hashes and syncs its share of the files.

    Raises:
        UserError: it could not be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f"{UNFINISHED}{state.step:08d}"
    try:
        from_main(world, lambda: _clear(folder))
        engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
        if world.is_main:
            (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
            (temporary / MODEL).write_text(model.model_dump_json(indent=1))
        barrier()
        files = _complete_files(temporary, state)
        mine = {name: _seal(temporary / name) for name in files[world.rank :: world.size]}
        sealed = {name: entry for part in gather_objects(mine) for name, entry in part.items()}
        manifest = json.dumps({"format": FORMAT, "files": sealed}, indent=1)
        from_main(world, lambda: _publish(temporary, manifest, final, keep_last))
    except (OSError, RuntimeError) as error:
        if from_a_collective(error):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"{final}: the checkpoint could not be written ({str(error).splitlines()[0]}); {free:.2f} GB are free "
            "there; earlier checkpoints are intact: free some space and run the same command to resume"
        ) from error
    return final


def newest(folder: Path, world: World | None = None) -> Path | None:
    """The newest sound checkpoint under `folder`, or None where there is no checkpoint at all. Damaged ones are skipped
    with a warning. With `world` every rank calls it: the main rank lists the folder, and all share the hashing.

    Raises:
        UserError: every checkpoint is damaged, or a rank sees another one than the main rank.
    """
    together = world if world and world.size > 1 else None
    candidates = from_main(together, lambda: _checkpoints(folder)) if together else _checkpoints(folder)
    damage = []
    for candidate in candidates:
        problem = _problem_over_ranks(candidate, together) if together else _problem(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is skipped: %s", candidate, problem)
        damage.append(f"{candidate.name}: {problem}")
    if damage:
        raise UserError(
            f"{folder}: no checkpoint of this run is complete and sound ({'; '.join(damage)}): restore one from a "
            "copy, or move the folder away to start from the beginning"
        )
    return None


def find(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: that of `step`, or the newest. All its files
    have the hashes of its manifest.

    Raises:
        UserError: there is none, or it is incomplete or damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        found: Path | None = path
    elif step is not None:
        found = path / "checkpoints" / f"step-{step:08d}"
        if not found.is_dir():
            there = ", ".join(str(_step(place)) for place in reversed(_checkpoints(found.parent))) or "none"
            raise UserError(f"{path}: holds no checkpoint of step {step}; there are those of: {there}")
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
    values = json.loads((checkpoint / STATE).read_text())
    if "rows" not in values:  # before 2026-11, when every step of a run had as many
        values["rows"] = values["step"] * values["recipe"]["train"]["global_batch_size"]
    return TrainState(**values)


def load_model_config(checkpoint: Path) -> ModelConfig:
    """The model's configuration in a checkpoint, its routing scales resolved."""
    return ModelConfig.model_validate_json((checkpoint / MODEL).read_text())


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer state of a sound checkpoint into the engine; what the recipe says of the optimizer
    (weight decay, betas, clipping, ...) stays as it is, where DeepSpeed would take the checkpoint's."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    with tensors_only():
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)
    if clip is not None:
        engine.optimizer.clip_grad = clip


@contextmanager
def tensors_only() -> Iterator[None]:
    """Whatever is unpickled in here, by DeepSpeed too, is made of tensors, plain values and three plain classes of
    DeepSpeed's: a file that would run code is refused, whoever wrote it and its hash."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    load = torch.load

    def load_tensors(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(file, *args, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "it is no file of torch.save")
            raise UserError(
                f"{file}: expected tensors alone, as this trainer writes them ({what.strip()}); the file is damaged or "
                "hostile: do not open it by other means"
            ) from error

    torch.load = load_tensors  # type: ignore[assignment]
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        torch.load = load


def load_weights(path: str | Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's (or a checkpoint folder's) checkpoint, gathered from its shards, on the CPU."""
    checkpoint = find(path, step)
    with tensors_only():
        return _gather_weights(checkpoint, load_state(checkpoint))


def _gather_weights(checkpoint: Path, state: TrainState) -> dict[str, torch.Tensor]:
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
    """Mapped: moments, which nobody asks for, are never read."""
    return torch.load(file, map_location="cpu", mmap=True)


def _checkpoints(folder: Path) -> list[Path]:
    """What bears a checkpoint's name exactly, newest first: a copy under another name is the user's own."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def _problem(checkpoint: Path) -> str | None:
    """Why a folder is no complete and sound checkpoint, or None; every file is hashed."""
    try:
        manifest = _read_manifest(checkpoint)
        _check_content(checkpoint, manifest, sorted(manifest.files))
        _check_state(checkpoint, manifest)
    except DamageError as damage:
        return str(damage)
    return None


def _problem_over_ranks(checkpoint: Path, world: World) -> str | None:
    """Like `_problem`, each rank hashing its share of the files; the same answer on every rank."""
    digest = problem = None
    try:
        manifest = _read_manifest(checkpoint)
        digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        _check_content(checkpoint, manifest, sorted(manifest.files)[world.rank :: world.size])
        _check_state(checkpoint, manifest)
    except DamageError as damage:
        problem = str(damage)
    seen = gather_objects((digest, problem))
    for rank, (other, reason) in enumerate(seen):
        if other != seen[0][0]:
            raise UserError(
                f"{checkpoint}: rank {rank} does not see what rank 0 sees there ({reason or 'another manifest'}; rank "
                f"0: {seen[0][1] or 'complete'}); all ranks need the same folder, on a shared and current file system"
            )
    return next((reason for _, reason in seen if reason), None)


class DamageError(Exception):
    """Why a folder is no sound checkpoint."""


def _read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, once all of its files are there in their sizes."""
    try:
        manifest = Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamageError(f"it has no {MANIFEST}") from error
    except OSError as error:
        raise DamageError(f"its {MANIFEST} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DamageError(f"its {MANIFEST} is damaged ({place + ': ' if place else ''}{first['msg']})") from error
    if manifest.format != FORMAT:
        raise DamageError(f"its {MANIFEST} has format {manifest.format}, this version reads {FORMAT}")
    for name, entry in manifest.files.items():
        if PurePosixPath(name).name != name:
            raise DamageError(f"its {MANIFEST} names {name!r}, which is no file of this folder")
        file = checkpoint / name
        if not file.is_file():
            raise DamageError(f"{name} is missing")
        if file.stat().st_size != entry.size:
            raise DamageError(f"{name} has {file.stat().st_size} bytes, expected {entry.size}")
    unlisted = sorted(path.name for path in checkpoint.glob("*.pt") if path.name not in manifest.files)
    if unlisted:  # DeepSpeed reads what it finds
        raise DamageError(f"{unlisted[0]} is not in its {MANIFEST}")
    return manifest


def _check_content(checkpoint: Path, manifest: Manifest, names: list[str]) -> None:
    for name in names:
        try:
            digest = _sha256(checkpoint / name)
        except OSError as error:
            raise DamageError(f"{name} cannot be read ({error.strerror})") from error
        if digest != manifest.files[name].sha256:
            raise DamageError(f"{name}: the content differs from the manifest's hash")


def _check_state(checkpoint: Path, manifest: Manifest) -> None:
    """Is everything there that belongs to the state, and is it of the step that the folder is named after?"""
    for name in (STATE, MODEL):
        if name not in manifest.files:
            raise DamageError(f"its {MANIFEST} lacks {name}")
    try:
        state = load_state(checkpoint)
        missing = _missing_shards(list(manifest.files), state)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamageError(f"{STATE} is damaged ({' '.join(str(error).split())})") from error
    if missing:
        raise DamageError(f"its {MANIFEST} lacks {missing}")
    if NAME.fullmatch(checkpoint.name) and state.step != _step(checkpoint):
        raise DamageError(f"{STATE} is of step {state.step}")


def _complete_files(folder: Path, state: TrainState) -> list[str]:
    """What the ranks have written, once all of them see the same and nothing is missing."""
    files = sorted(path.name for path in folder.iterdir())
    for rank, theirs in enumerate(gather_objects(files)):
        if missing := _missing_shards(theirs, state):
            raise OSError(f"{missing} is missing on rank {rank}; do all ranks have the same folder?")
    return files


def _missing_shards(files: list[str], state: TrainState) -> str | None:
    """A shard that the state has and the files lack."""
    stage = state.recipe["parallel"]["zero_stage"]
    kinds = ["optim_states"] if stage else []
    kinds += ["model_states"] if stage == 3 else []
    for rank in range(state.world):
        for kind in kinds:
            ending = f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
            if not any(name.endswith(ending) for name in files):
                return ending
    return None if stage == 3 or MODEL_STATES in files else MODEL_STATES


def _clear(folder: Path) -> None:
    """Remove what a killed process left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for beginning in (UNFINISHED, DISCARDED):
        for leftover in folder.glob(f"{beginning}*"):
            _remove(leftover)


def _publish(temporary: Path, manifest: str, final: Path, keep_last: int) -> None:
    _write_synced(temporary / MANIFEST, manifest)
    _sync(temporary)
    folder = final.parent
    if final.exists() or final.is_symlink():  # a damaged one of that name: a sound one would have been resumed from
        os.replace(final, folder / f"{DISCARDED}{final.name[5:]}")
    os.replace(temporary, final)
    if (folder / "latest").is_dir():
        shutil.rmtree(folder / "latest")
    _write_synced(folder / ".latest", final.name)
    os.replace(folder / ".latest", folder / "latest")
    _sync(folder)
    complete = [path for path in _checkpoints(folder) if _step(path) <= _step(final) and _is_complete(path)]
    for old in complete[keep_last:]:
        os.replace(old, folder / f"{DISCARDED}{old.name[5:]}")
    for discarded in folder.glob(f"{DISCARDED}*"):
        _remove(discarded)


def _is_complete(checkpoint: Path) -> bool:
    """Sizes only. A link leads to where the user has put a checkpoint: it is none of ours to remove."""
    try:
        return bool(_read_manifest(checkpoint)) and not checkpoint.is_symlink()
    except DamageError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    """A file's SHA-256. An unchanged file is hashed once: a command finds the same checkpoint several times."""
    status = path.stat()
    return _hash_of(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of(path: Path, inode: int, size: int, modified: int) -> str:
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
