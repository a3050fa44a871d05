"""Writing checkpoints: each one complete or absent, beside the training, at most one at a time.

What a rank updates is copied to the host, and training goes on while a thread writes the copy to `.tmp-step-N`, syncs
and hashes it. At a later step, once every rank has written, the main rank adds index and manifest, renames the folder
to `step-N`, and moves `latest` last.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dash_train.distributed.world import World, from_a_collective, from_main, gather_objects
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.recipe.schema import CheckpointConfig
from dash_train.training.checkpoint import (
    FORMAT,
    MANIFEST,
    MODEL,
    STATE,
    TrainState,
    checkpoints_in,
    is_complete,
    load_state,
    step_of,
)
from dash_train.training.model_state import pieces, tensors_of
from dash_train.training.remote import Remote
from dash_train.training.tensor_files import INDEX, Parameter, dump_index, file_of, merge_indices, write

UNFINISHED, DISCARDED = ".tmp-step-", ".old-step-"  # being written, and being removed

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run. Every rank has one, and calls each method at the same step."""

    def __init__(self, world: World, folder: Path, config: CheckpointConfig) -> None:
        self.world, self.folder, self.config = world, folder, config
        self._stall_seconds = 0.0
        self._host: dict[str, Tensor] = {}  # kept for the next snapshot
        self._pending: _Writing | None = None
        self._remote = Remote(config.copy_to) if config.copy_to and world.is_main else None

    def close(self) -> None:
        """Wait for the last copy."""
        if self._remote:
            self._remote.wait()

    @property
    def pending(self) -> bool:
        """A checkpoint has begun and is not published yet."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """This rank is not done with its part of it."""
        return self._pending is not None and self._pending.thread.is_alive()

    def stall(self) -> dict[str, float]:
        """How long training has stood still for checkpoints since this was asked last, as a metric; none where not."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return {"checkpoint_stall_seconds": seconds} if seconds else {}

    def save(self, engine: Any, state: TrainState, model: ModelConfig, extra: dict[str, dict[str, Tensor]]) -> None:
        """Begin a checkpoint of `state.step`, or write it whole where `checkpoint.asynchronous` is false. `extra` is
        more that is kept of every piece, by kind and parameter.

        Raises:
            UserError: it, or the one before, could not be written; earlier checkpoints are untouched.
        """
        self.finish()
        with self._standing_still(), self._explaining(state.step):
            temporary = self.folder / f"{UNFINISHED}{state.step:08d}"
            tensors, places = self._snapshot(engine, extra)
            needed = sum(gather_objects(sum(tensor.nbytes for tensor in tensors.values())))
            from_main(self.world, lambda: _make_room(self.folder, temporary, needed))
            self._pending = _Writing(temporary, self.world, state, model, tensors, places)
        if not self.config.asynchronous:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint that has begun, publish it and return its folder; None where none has begun."""
        if self._pending is None:
            return None
        writing, self._pending = self._pending, None
        with self._standing_still(), self._explaining(writing.state.step):
            writing.thread.join()
            self.close()  # publishing may remove the one that is being copied
            parts = gather_objects((writing.entries, writing.places, writing.error))
            if errors := [error for _, _, error in parts if error]:
                raise OSError(errors[0])
            seen = gather_objects(_names(writing.folder))  # now that all have written
            final = self.folder / f"step-{writing.state.step:08d}"
            from_main(self.world, lambda: self._publish(writing.folder, parts, seen, final))
            written = time.perf_counter() - writing.begun
        if self._remote:
            self._remote.copy(final)
        logger.info("step %d: saved %s (in %.1f s)", writing.state.step, final, written)
        return final

    def _snapshot(
        self, engine: Any, extra: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Parameter]]:
        """Copies of what this rank updates, on the host, and where in its parameter each stands. On stage 0, where all
        ranks hold everything, each takes its share."""
        whole = engine.zero_optimization_stage() == 0
        copies, places = {}, {}
        for number, piece in enumerate(pieces(engine)):
            if whole and number % self.world.size != self.world.rank:
                continue
            held = tensors_of(engine, piece)
            held |= {kind: tensors[piece.name] for kind, tensors in extra.items()}
            for kind, tensor in held.items():
                copies[f"{kind}/{piece.name}"] = self._to_host(f"{kind}/{piece.name}", tensor)
            file = file_of(self.world.rank)
            places[piece.name] = Parameter(
                shape=list(piece.shape), kinds=sorted(held), pieces=[(file, piece.start, piece.size)]
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies, places

    def _to_host(self, key: str, tensor: Tensor) -> Tensor:
        host = self._host.get(key)
        if host is None:
            pinned = tensor.device.type == "cuda"
            host = self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return host.copy_(tensor, non_blocking=True)

    def _publish(self, temporary: Path, parts: list[Any], seen: list[list[str]], final: Path) -> None:
        index = merge_indices([places for _, places, _ in parts])
        if gap := index.gap():
            raise OSError(f"elements of {gap} are missing; do all ranks have the same folder?")
        for rank, names in enumerate(seen):
            if missing := sorted(index.files - set(names)):
                raise OSError(f"rank {rank} does not see {missing[0]}; do all ranks have the same folder?")
        files = {name: entry for entries, _, _ in parts for name, entry in entries.items()}
        write_synced(temporary / INDEX, dump_index(index))
        files |= {name: seal(temporary / name) for name in (INDEX, STATE, MODEL)}
        write_synced(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync(temporary)
        if final.exists() or final.is_symlink():  # a damaged one of that name: a sound one would have been resumed from
            os.replace(final, self.folder / f"{DISCARDED}{final.name[5:]}")
        os.replace(temporary, final)
        if (self.folder / "latest").is_dir():
            shutil.rmtree(self.folder / "latest")
        write_synced(self.folder / ".latest", final.name)
        os.replace(self.folder / ".latest", self.folder / "latest")
        _sync(self.folder)
        complete = [path for path in checkpoints_in(self.folder) if step_of(path) <= step_of(final)]
        for old in superfluous([path for path in complete if is_complete(path)], self.config):
            os.replace(old, self.folder / f"{DISCARDED}{old.name[5:]}")
        for discarded in self.folder.glob(f"{DISCARDED}*"):
            _remove(discarded)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._stall_seconds += time.perf_counter() - begun

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if from_a_collective(error):
                raise
            free = shutil.disk_usage(self.folder).free / 1e9
            raise UserError(
                f"{self.folder / f'step-{step:08d}'}: the checkpoint could not be written "
                f"({str(error).splitlines()[0]}); {free:.2f} GB are free there; earlier checkpoints are intact: free "
                "some space and run the same command to resume"
            ) from error


class _Writing:
    """A checkpoint under way: this rank's part is written by a thread that meets no other rank."""

    def __init__(
        self,
        folder: Path,
        world: World,
        state: TrainState,
        model: ModelConfig,
        tensors: dict[str, Tensor],
        places: dict[str, Parameter],
    ) -> None:
        self.folder, self.world, self.state = folder, world, state
        # As they are now: training goes on meanwhile.
        self.texts = {STATE: json.dumps(asdict(state), indent=1), MODEL: model.model_dump_json(indent=1)}
        self.tensors, self.places = tensors, places
        self.entries: dict[str, dict[str, Any]] = {}
        self.error = ""
        self.begun = time.perf_counter()
        self.thread = threading.Thread(target=self._write, name="checkpoint")
        self.thread.start()

    def _write(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)  # seen late on a network file system
            path = self.folder / file_of(self.world.rank)
            write(path, self.tensors)
            self.entries[path.name] = seal(path)
            for name, text in self.texts.items() if self.world.is_main else ():
                (self.folder / name).write_text(text)
        except (OSError, RuntimeError, SafetensorError) as error:
            self.error = str(error) or type(error).__name__


def superfluous(checkpoints: list[Path], config: CheckpointConfig) -> list[Path]:
    """Those of complete checkpoints, newest first, that neither `keep_last` nor `keep_every` nor `keep_best` keeps."""
    old = checkpoints[config.keep_last :]
    if config.keep_every:
        old = [path for path in old if step_of(path) % config.keep_every]
    if config.keep_best and old:
        losses = {path: load_state(path).validation_loss for path in checkpoints}
        measured = [path for path in checkpoints if losses[path] is not None]
        best = sorted(measured, key=lambda path: losses[path] or 0.0)[: config.keep_best]
        old = [path for path in old if path not in best]
    return old


def _make_room(folder: Path, temporary: Path, needed: int) -> None:
    """Remove what a killed process left behind, and see that there is space."""
    folder.mkdir(parents=True, exist_ok=True)
    for beginning in (UNFINISHED, DISCARDED):
        for leftover in folder.glob(f"{beginning}*"):
            _remove(leftover)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e9:.2f} GB")
    temporary.mkdir()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def seal(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, once it is on the disk."""
    _sync(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
