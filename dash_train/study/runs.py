"""A study: variants of one recipe, each with several seeds, trained side by side, several at a time on each GPU."""

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import yaml
from pydantic import Field, ValidationError

from dash_train.data.prepare import prepare
from dash_train.distributed.signals import StopFlag
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.recipe.schema import Recipe
from dash_train.recipe.section import Section
from dash_train.training import checkpoint

FIRST_PORT = 20000  # below those that the system gives out by itself: nobody takes one before its run listens to it
OUTPUT = "output.log"  # what a run printed, in its folder
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)

Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class Study(Section):
    recipe: str
    """The recipe that all runs share."""
    run_dir: str
    """Folder of the runs, one for each variant and seed."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """`key.sub: value` that replace the recipe's in all runs."""
    variants: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """By name, `key.sub: value` of one variant; the others are compared with the first."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """Seeds of the initial weights: a run of every variant for each. Rows and their order are those of data.seed."""


@dataclass(frozen=True)
class Run:
    """One run of a study: `launch/pretrain.py ARGUMENTS`."""

    variant: str
    seed: int
    arguments: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run_dir)

    def checkpoint(self) -> Path | None:
        """The checkpoint of the last step, once it is there."""
        found = checkpoint.newest(self.folder / "checkpoints")
        return found if found and checkpoint.load_state(found).step >= self.recipe.train.steps else None

    def changed(self, overrides: dict[str, Any]) -> "Run":
        """This run with other values."""
        arguments = (*self.arguments, *_strings(overrides))
        return Run(self.variant, self.seed, arguments, load_recipe(arguments[0], arguments[1:]))


def load_study(path: Path) -> Study:
    """Read and check a study.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    try:
        return Study.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def study_runs(study: Study, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of a study, every variant with the first seed first; `overrides` come before the variants' own.

    Raises:
        UserError: one of them has no valid recipe.
    """
    runs = []
    for seed, (variant, own) in itertools.product(study.seeds, study.variants.items()):
        last = {**own, "train.seed": seed, "run_dir": f"{study.run_dir}/{variant}-s{seed}", "tracking.log_every": 1}
        arguments = (study.recipe, *_strings(study.overrides), *overrides, *_strings(last))
        runs.append(Run(variant, seed, arguments, load_recipe(study.recipe, arguments[1:])))
        if not runs[-1].recipe.train.validate_every:
            raise UserError(f"{variant}: train.validate_every is 0, but a study compares validation losses")
    return runs


def _strings(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


class Started(NamedTuple):
    """A run that has been started."""

    run: Run
    gpu: str
    process: "subprocess.Popen[bytes]"


class Launcher:
    """Starts runs on this machine's GPUs (or its CPU). At `deadline` (of time.monotonic), or when this process is told
    to stop, it ends those that run: they save a checkpoint and resume when they are started again.
    """

    def __init__(self, program: Path, deadline: float) -> None:
        self.program, self.deadline = program, deadline
        self.stop = StopFlag()
        self.stop.training = True  # runs are told to save before this process ends
        self.ports = itertools.count(FIRST_PORT + os.getpid() % 5000)

    def train(self, runs: Sequence[Run], per_gpu: int) -> list[Run]:
        """Bring the runs to their end, `per_gpu` at a time on each GPU. Returns those that failed; where there was no
        time for all, some are just not done.
        """
        waiting = deque(run for run in runs if not run.checkpoint())
        self._prepare_data(waiting)
        free = deque(_gpus() * per_gpu)
        running: list[Started] = []
        failed = []
        ending = False
        while waiting or running:
            if self._is_over() and not ending:
                ending = True
                waiting.clear()
                for started in running:
                    started.process.terminate()
            while waiting and free:
                running.append(self._start(waiting.popleft(), free.popleft()))
            time.sleep(POLL_SECONDS)
            for started in [started for started in running if started.process.poll() is not None]:
                running.remove(started)
                free.append(started.gpu)
                if started.process.returncode and not ending:
                    failed.append(started.run)
                _report(started, ending)
        return failed

    def _is_over(self) -> bool:
        return self.stop.received is not None or time.monotonic() > self.deadline

    def _prepare_data(self, runs: Sequence[Run]) -> None:
        """Once, so that the runs, which start together, find it."""
        for data in {run.recipe.data.model_dump_json(): run.recipe.data for run in runs}.values():
            prepare(data)

    def _start(self, run: Run, gpu: str) -> "Started":
        logger.info("%s: starts on %s", run.folder, f"GPU {gpu}" if gpu else "the CPU")
        run.folder.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "CUDA_VISIBLE_DEVICES": gpu, "MASTER_PORT": self._port()}
        command = [sys.executable, str(self.program), *run.arguments]
        with (run.folder / OUTPUT).open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        return Started(run, gpu, process)

    def _port(self) -> str:
        for port in self.ports:
            with socket.socket() as listener:
                if listener.connect_ex(("127.0.0.1", port)):
                    return str(port)
        raise AssertionError


def _gpus() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES that each name one of the GPUs that are visible here; "" for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return names or [""]


def _report(ended: Started, ending: bool) -> None:
    """Say how a run ended; of one that failed, with the last lines that it wrote."""
    code = ended.process.returncode
    if code and not ending:
        lines = (ended.run.folder / OUTPUT).read_text(errors="replace").splitlines()
        logger.error("%s: failed with exit code %d:\n%s", ended.run.folder, code, "\n".join(lines[-20:]))
    else:
        logger.info("%s: %s", ended.run.folder, "done" if ended.run.checkpoint() else "stopped")


def alone(run: Run, steps: int) -> Run:
    """A run that goes on for some steps in a folder of its own: started by itself on a GPU, it shows its speed."""
    trained = run.checkpoint()
    assert trained is not None
    folder = run.folder.with_name(f"{run.variant}-alone")
    link = folder / "checkpoints" / trained.name
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(trained.resolve())
    return run.changed(
        {
            "run_dir": str(folder),
            "train.steps": run.recipe.train.steps + steps,
            "train.validate_every": 0,
            "checkpoint.keep_last": 1000,  # the link is not its to remove
        }
    )
