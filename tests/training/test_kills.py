"""Runs that are killed at any moment go on as if nothing had happened, to the last bit."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ENVIRONMENT, ROOT, write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer

KEYS = ("loss", "lr", "grad_norm", "tokens", "epoch", "rows_hash", "density", "skipped_steps")
OPTIONS = {"train__steps": 16, "checkpoint__every": 1, "train__validate_every": 8, "train__global_batch_size": 4}
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES = [
    ("stage 1", 2, {"parallel": {"zero_stage": 1}}),
    ("stage 3", 2, {"parallel": {"zero_stage": 3}, "deepspeed": CUT}),
    ("context 2", 2, {"parallel": {"zero_stage": 3, "context": 2}, "deepspeed": CUT}),
]


def run_killed(recipe, ranks, kills, seed=0):
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed_runs.py"), str(recipe)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    arguments = [str(ranks), str(kills), str(seed)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=540)


def every_line(run_dir):
    """All lines that were ever written, torn ones aside."""
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "ranks", "changes"), CASES, ids=[case[0] for case in CASES])
def test_seven_kills_leave_no_trace(tmp_path, corpus, name, ranks, changes):
    whole, killed = (
        write_recipe(tmp_path / kind / "recipe.yaml", corpus, **OPTIONS, **changes) for kind in ("whole", "killed")
    )
    for recipe, kills in ((whole, 0), (killed, 7)):
        result = run_killed(recipe, ranks, kills, seed=len(name))
        assert result.returncode == 0 and f"{kills} kills" in result.stdout, result.stderr[-3000:]
    wanted = {(line["step"], "loss" in line): line for line in every_line(tmp_path / "whole" / "run")}
    seen = {}
    for line in every_line(tmp_path / "killed" / "run"):
        key = (line["step"], "loss" in line)
        assert {k: line.get(k) for k in KEYS} == {k: wanted[key].get(k) for k in KEYS}
        seen[key] = line
    assert seen.keys() == wanted.keys()
    ours, theirs = (checkpoint.find(tmp_path / kind / "run") for kind in ("killed", "whole"))
    files = sorted(path.name for path in theirs.glob("rank-*"))
    assert len(files) == ranks
    assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)
    assert not list(ours.parent.glob(".*-step-*"))


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_no_file_of_a_run_is_unpickled(tmp_path, corpus):
    """A pickle in the place of every file of a checkpoint and of a run, its hash right or wrong."""
    path = write_recipe(tmp_path / "recipe.yaml", corpus, train__steps=2, train__validate_every=0)
    Trainer(load_recipe(path)).train()
    pristine = shutil.copytree(tmp_path / "run", tmp_path / "pristine")
    victim = tmp_path / "executed"
    names = [str(file.relative_to(pristine)) for file in sorted(pristine.rglob("*")) if file.is_file()]
    names += ["checkpoints/step-00000002/extra.pt", "checkpoints/step-00000002/pytorch_model.bin"]
    for name in names:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(pristine, tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(pickle.dumps(Hostile(victim)))
        for use in (
            lambda: checkpoint.load_weights(tmp_path / "run"),
            lambda: Trainer(load_recipe(path, ["train.steps=3"])),
        ):
            try:
                use()
            except (UserError, ValueError, OSError):
                continue
        assert not victim.exists(), name
