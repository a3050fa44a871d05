"""Checkpoints that are either complete or absent: finding, checking and reading them. `saving.py` writes them.

A folder without a valid manifest is never read. Layout of `RUN/checkpoints/step-N`:

    manifest.json       format, and the size and SHA-256 of every other file
    state.json          step, tokens, rows, data fingerprint, recipe, ...
    model.json          the model's configuration, resolved routing scales included
    index.json          which elements of which parameter lie in which file
    rank-*.safetensors  fp32 weights and moments by name, a file a rank
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from dash_train.distributed.world import World, from_main, gather_objects
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.training import deepspeed_format
from dash_train.training.model_state import WEIGHT
from dash_train.training.tensor_files import INDEX, TensorFiles, read_index

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.json"
TOKENIZER = "tokenizer"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
NAME = re.compile(r"step-(\d{8,})")

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
    """What a resume needs besides weights and moments."""

    step: int
    """Optimizer steps taken, skipped ones included."""
    tokens: int
    """Tokens whose loss was counted so far."""
    skipped_steps: int
    """Steps skipped for a non-finite gradient."""
    fingerprint: dict[str, Any]
    """What the data is made of (`RowDataset.fingerprint`)."""
    world: int
    """Ranks that wrote the files."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    rows: int
    """Rows of the training set read so far."""
    source_tokens: list[int] | None = None
    """`tokens` by source; earlier versions did not count them."""
    optimizer_steps: int = 0
    """The optimizer's own count of its steps."""
    stage: int = 0
    """Which of the recipe's stages, from 0."""
    validation_loss: float | None = None
    """Where this step was validated."""
    data: str | None = None
    """Folder of the prepared data."""


def newest(folder: Path, world: World | None = None) -> Path | None:
    """The newest sound checkpoint under `folder`, or None where there is no checkpoint at all. Damaged ones are skipped
    with a warning. With `world` every rank calls it: the main rank lists the folder, and all share the hashing.

    Raises:
        UserError: every checkpoint is damaged, or a rank sees another one than the main rank.
    """
    together = world if world and world.size > 1 else None
    candidates = from_main(together, lambda: checkpoints_in(folder)) if together else checkpoints_in(folder)
    damage = []
    for candidate in candidates:
        problem = _problem_over_ranks(candidate, together) if together else problem_of(candidate)
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
            there = ", ".join(str(step_of(place)) for place in reversed(checkpoints_in(found.parent))) or "none"
            raise UserError(f"{path}: holds no checkpoint of step {step}; there are those of: {there}")
    else:
        found = newest(path / "checkpoints")
    if found is None:
        raise UserError(f"{path}: expected a run folder that holds a complete checkpoint, found none")
    problem = problem_of(found)
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


def load_weights(path: str | Path, step: int | None = None, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's (or a checkpoint folder's) checkpoint, gathered from its files, on the CPU; or what
    else it keeps of every parameter, as `ema`.

    Raises:
        UserError: there is no sound checkpoint, or it keeps nothing of that kind.
    """
    found = find(path, step)
    if _read_manifest(found).format == deepspeed_format.FORMAT:
        state = load_state(found)
        return deepspeed_format.load_weights(found, state.recipe, state.world)
    files = TensorFiles(found)
    if kind not in files.kinds:
        raise UserError(f"{found}: holds no {kind}, but {', '.join(sorted(files.kinds))}")
    weights = {name: files.whole(name, kind) for name in files.parameters}
    if load_model_config(found).tie_embeddings:
        weights[OUTPUT] = weights[EMBEDDING]
    return weights


def is_of_deepspeed(checkpoint: Path) -> bool:
    """Whether a sound checkpoint is one of version 0.1."""
    return _read_manifest(checkpoint).format == deepspeed_format.FORMAT


def checkpoints_in(folder: Path) -> list[Path]:
    """What bears a checkpoint's name exactly, newest first: a copy under another name is the user's own."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def problem_of(checkpoint: Path) -> str | None:
    """Why a folder is no complete and sound checkpoint, or None; every file is hashed."""
    try:
        manifest = _read_manifest(checkpoint)
        _check_content(checkpoint, manifest, sorted(manifest.files))
        _check_state(checkpoint, manifest)
    except DamageError as damage:
        return str(damage)
    return None


def _problem_over_ranks(checkpoint: Path, world: World) -> str | None:
    """Like `problem_of`, each rank hashing its share of the files; the same answer on every rank."""
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
    if manifest.format not in (FORMAT, deepspeed_format.FORMAT):
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
    if unlisted and manifest.format == deepspeed_format.FORMAT:  # DeepSpeed reads what it finds
        raise DamageError(f"{unlisted[0]} is not in its {MANIFEST}")
    return manifest


def _check_content(checkpoint: Path, manifest: Manifest, names: list[str]) -> None:
    for name in names:
        try:
            digest = sha256_of(checkpoint / name)
        except OSError as error:
            raise DamageError(f"{name} cannot be read ({error.strerror})") from error
        if digest != manifest.files[name].sha256:
            raise DamageError(f"{name}: the content differs from the manifest's hash")


def _check_state(checkpoint: Path, manifest: Manifest) -> None:
    """Is everything there that belongs to the state, and is it of the step that the folder is named after?"""
    for name in (STATE, MODEL):
        if name not in manifest.files:
            raise DamageError(f"its {MANIFEST} lacks {name}")
    reading = STATE
    try:
        state = load_state(checkpoint)
        reading = INDEX
        missing = _missing(checkpoint, manifest, state)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamageError(f"{reading} is damaged ({' '.join(str(error).split())})") from error
    if missing:
        raise DamageError(f"its {MANIFEST} lacks {missing}")
    if NAME.fullmatch(checkpoint.name) and state.step != step_of(checkpoint):
        raise DamageError(f"{STATE} is of step {state.step}")


def _missing(checkpoint: Path, manifest: Manifest, state: TrainState) -> str | None:
    """A file, or elements of a parameter, that should be there and are not."""
    if manifest.format == deepspeed_format.FORMAT:
        return deepspeed_format.missing_shard(list(manifest.files), state.recipe, state.world)
    if INDEX not in manifest.files:
        return INDEX
    index = read_index(checkpoint)
    if gap := index.gap():
        return f"elements of {gap}"
    return min(index.files - manifest.files.keys(), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Sizes only. A link leads to where the user has put a checkpoint: it is none of ours to remove."""
    try:
        return bool(_read_manifest(checkpoint)) and not checkpoint.is_symlink()
    except DamageError:
        return False


def sha256_of(path: Path) -> str:
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
