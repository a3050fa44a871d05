"""Checkpoints that version 0.1 has written go on, and none of their pickles runs code."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer

OPTIONS = {"train__validate_every": 0, "schedule__type": "constant", "checkpoint__keep_last": 1}
CASES = [(stage, "fp32") for stage in range(4)] + [(1, "bf16")]
SHARD = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL_STATES = "mp_rank_00_model_states.pt"


def recipe_of(folder, corpus, stage=1, precision="fp32", **more):
    options = {**OPTIONS, "parallel__zero_stage": stage, "train__precision": precision, **more}
    return load_recipe(write_recipe(folder / "recipe.yaml", corpus, **options))


def rewrite_as_0_1(trainer):
    """Replace the checkpoint that a run has just ended with by the one that version 0.1 would have written."""
    now = checkpoint.find(trainer.run_dir)
    old = now.with_name("old")
    trainer.engine.save_checkpoint(str(now.parent), tag=old.name, save_latest=False)
    state = json.loads((now / "state.json").read_text())
    for key in ("optimizer_steps", "stage", "validation_loss", "data", "source_tokens"):
        del state[key]
    (old / "state.json").write_text(json.dumps(state))
    shutil.copy(now / "model.json", old)
    shutil.rmtree(now)
    old.rename(now)
    seal(now)
    return now


def seal(folder):
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_run_of_0_1_goes_on(tmp_path, corpus, stage, precision):
    Trainer(recipe_of(tmp_path / "whole", corpus, stage, precision, train__steps=4)).train()
    trainer = Trainer(recipe_of(tmp_path, corpus, stage, precision, train__steps=2))
    trainer.train()
    weights = checkpoint.load_weights(tmp_path / "run")
    found = rewrite_as_0_1(trainer)
    gathered = checkpoint.load_weights(found)
    assert gathered.keys() == weights.keys()
    assert all(torch.equal(gathered[name], weights[name]) for name in weights)
    Trainer(recipe_of(tmp_path, corpus, stage, precision, train__steps=4)).train()
    whole, parts = (read_metrics(folder / "run")[0] for folder in (tmp_path / "whole", tmp_path))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    assert not checkpoint.is_of_deepspeed(checkpoint.find(tmp_path / "run")), "what it saves now is of today"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("old")
    trainer = Trainer(recipe_of(folder, corpus, train__steps=2))
    trainer.train()
    rewrite_as_0_1(trainer)
    return folder / "run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__zero_stage": 2}, "parallel.zero_stage is 1 there and 2 here, and a checkpoint of version 0.1"),
        ({"train__precision": "bf16"}, "train.precision is fp32 there and bf16 here"),
    ],
)
def test_it_goes_on_with_what_it_had(old_run, corpus, tmp_path, changes, message):
    shutil.copytree(old_run, tmp_path / "run")
    options = {"train__steps": 4, **OPTIONS, **changes}
    with pytest.raises(UserError, match=message):
        Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options)))


def test_a_shard_that_is_not_there_is_damage(old_run, tmp_path):
    found = shutil.copytree(old_run, tmp_path / "run") / "checkpoints" / "step-00000002"
    (found / SHARD).unlink()
    seal(found)
    with pytest.raises(UserError, match=f"lacks {SHARD}"):
        checkpoint.find(tmp_path / "run")


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("name", [SHARD, MODEL_STATES, "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_no_file_of_a_checkpoint_runs_code(old_run, corpus, tmp_path, name):
    """Whether its hash is right or it is not in the manifest at all."""
    folder = shutil.copytree(old_run, tmp_path / "run") / "checkpoints" / "step-00000002"
    listed = (folder / name).exists()
    torch.save({"module": Hostile(tmp_path / "run-by-the-file")}, folder / name)
    if listed:
        seal(folder)
    with pytest.raises(UserError, match=name):
        checkpoint.load_weights(folder)
    with pytest.raises(UserError, match=name):
        Trainer(recipe_of(tmp_path, corpus, train__steps=6))
    assert not (tmp_path / "run-by-the-file").exists()
