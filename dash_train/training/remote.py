"""Copies of checkpoints at an address that fsspec knows (`s3://`, `gs://`, another disk), and a run that begins there.

A checkpoint's manifest is copied last: without it, it is not complete. Nothing is ever removed at the address.
"""

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec

from dash_train.errors import UserError
from dash_train.training.checkpoint import MANIFEST, NAME, TOKENIZER

ALONGSIDE = (TOKENIZER, "recipe.yaml")  # what a run needs beside its checkpoints

logger = logging.getLogger(__name__)


class Remote:
    """The copies of one run. Only the main rank has it."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.copy_to: {address}: {' '.join(str(error).split())}") from error
        self._thread: threading.Thread | None = None

    def copy(self, checkpoint: Path) -> None:
        """Begin to copy a complete checkpoint, once the one before has been; what fails is warned of."""
        self.wait()
        self._thread = threading.Thread(target=self._copy, args=(checkpoint,), name="copy of a checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being copied."""
        if self._thread is not None:
            self._thread.join()

    def fetch(self, run_dir: Path) -> Path | None:
        """Bring the newest complete checkpoint to a run folder that has none, and what belongs to the run; returns it.

        Raises:
            UserError: it cannot be read.
        """
        try:
            found = sorted(path for path in self._listed() if self._files.exists(f"{path}/{MANIFEST}"))
            if not found:
                return None
            name = found[-1].rpartition("/")[2]
            folder, unfinished = run_dir / "checkpoints", run_dir / "checkpoints" / f".tmp-{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for file in self._files.ls(found[-1], detail=False):
                self._files.get_file(file, str(unfinished / file.rpartition("/")[2]))
            for beside in ALONGSIDE:
                if self._files.exists(f"{self._root}/{beside}") and not (run_dir / beside).exists():
                    self._files.get(f"{self._root}/{beside}", str(run_dir / beside), recursive=True)
            os.replace(unfinished, folder / name)
        except OSError as error:
            raise UserError(f"checkpoint.copy_to: {self.address}: {' '.join(str(error).split())}") from error
        logger.info("%s: brought from %s", folder / name, self.address)
        return folder / name

    def _listed(self) -> list[str]:
        place = f"{self._root}/checkpoints"
        if not self._files.exists(place):
            return []
        return [path for path in self._files.ls(place, detail=False) if NAME.fullmatch(path.rpartition("/")[2])]

    def _copy(self, checkpoint: Path) -> None:
        there = f"{self._root}/checkpoints/{checkpoint.name}"
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        try:
            self._files.makedirs(there, exist_ok=True)
            for path in sorted(files, key=lambda path: path.name == MANIFEST):
                self._files.put_file(str(path), f"{there}/{path.name}")
            for beside in ALONGSIDE:
                self._put(checkpoint.parent.parent / beside, f"{self._root}/{beside}")
            logger.info("%s: copied to %s", checkpoint.name, self.address)
        except Exception as error:  # of whichever library reaches the address
            logger.warning("%s: not copied to %s: %s", checkpoint.name, self.address, " ".join(str(error).split()))

    def _put(self, path: Path, there: str) -> None:
        if path.is_dir():
            self._files.makedirs(there, exist_ok=True)
            for file in path.iterdir():
                self._put(file, f"{there}/{file.name}")
        elif path.exists():
            self._files.put_file(str(path), there)
