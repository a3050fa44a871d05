"""Checkpoints beside the training: what is written, when, and what is kept."""

import logging
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch
from commands import program
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.huggingface.export import export_run
from dash_train.inference.trained import load_trained
from dash_train.recipe.load import load_recipe
from dash_train.recipe.schema import CheckpointConfig
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint, derived, listing, saving
from dash_train.training.saving import superfluous
from dash_train.training.tensor_files import TensorFiles, write
from dash_train.training.trainer import Trainer

OPTIONS = {"train__validate_every": 0, "checkpoint__every": 2, "checkpoint__keep_last": 9}
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def recipe(tmp_path, corpus):
    def load(name="run", **changes):
        path = tmp_path / f"{name}.yaml"
        return load_recipe(write_recipe(path, corpus, run_dir=str(tmp_path / name), **{**OPTIONS, **changes}))

    return load


def steps_in(run):
    return sorted(checkpoint.step_of(path) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_while_a_checkpoint_is_written(recipe, tmp_path, monkeypatch, stage):
    """Each is what a synchronous one is, to the last bit, and only one is written at a time."""
    Trainer(recipe("whole", checkpoint__asynchronous=False, parallel__zero_stage=stage)).train()
    writing, most, stepped = [], [], []

    def slowly(path, tensors):
        writing.append(path)
        most.append(len(writing))
        time.sleep(0.6)
        write(path, tensors)
        stepped.append(trainer.step)
        writing.remove(path)

    monkeypatch.setattr(saving, "write", slowly)
    trainer = Trainer(recipe(parallel__zero_stage=stage))
    trainer.train()
    assert steps_in(tmp_path / "run") == steps_in(tmp_path / "whole") == [2, 4, 6]
    assert max(most) == 1
    assert stepped[0] > 2, "steps were taken meanwhile"
    for step in (2, 4, 6):
        ours, theirs = (checkpoint.find(tmp_path / name, step) for name in ("run", "whole"))
        for name in ("rank-00000.safetensors", "index.json", "model.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    stalls = [line.get("checkpoint_stall_seconds", 0.0) for line in read_metrics(tmp_path / "run")[0]]
    assert stalls[2] > 0 and threading.active_count() < 20


def test_a_write_that_fails_meanwhile_ends_the_run_and_harms_nothing(recipe, tmp_path, monkeypatch):
    def failing(path, tensors):
        write(path, tensors)
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write", failing)
    with pytest.raises(UserError, match=r"step-00000004: the checkpoint could not be written .*No space left"):
        Trainer(recipe(train__steps=20)).train()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000002"


def test_space_is_looked_at_before_a_save(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"step-00000002: .*\(it takes 0\.00 GB\); 0\.00 GB are free there"):
        Trainer(recipe()).train()
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


def test_what_is_kept(recipe, tmp_path, monkeypatch):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: 4.0}
    State = namedtuple("State", ["validation_loss"])
    monkeypatch.setattr(saving, "load_state", lambda path: State(losses[checkpoint.step_of(path)]))
    paths = [tmp_path / f"step-{step:08d}" for step in (6, 5, 4, 3, 2, 1)]

    def dropped(**options):
        return [checkpoint.step_of(path) for path in superfluous(paths, CheckpointConfig(**options))]

    assert dropped(keep_last=2) == [4, 3, 2, 1]
    assert dropped(keep_last=1, keep_every=2) == [5, 3, 1]
    assert dropped(keep_last=1, keep_best=2) == [5, 3, 1]
    assert dropped(keep_last=1, keep_best=1, keep_every=3) == [5, 4, 1]


def test_the_best_is_kept(recipe, tmp_path):
    changes = {"train__validate_every": 2, "checkpoint__keep_best": 1, "checkpoint__keep_last": 1}
    Trainer(recipe(optimizer__lr=1e-9, train__steps=8, **changes)).train()
    _, validation = read_metrics(tmp_path / "run")
    best = min(validation[1:], key=lambda line: line["validation_loss"])["step"]
    assert steps_in(tmp_path / "run") == sorted({best, 8})


def test_a_time_limit_saves_and_ends(recipe, tmp_path, caplog):
    """This process is older than a tenth of a second."""
    with caplog.at_level(logging.INFO):
        Trainer(recipe(train__time_limit=0.1)).train()
    assert steps_in(tmp_path / "run") == [1]
    assert "stopped by train.time_limit after step 1; run the same command to resume" in caplog.text
    Trainer(recipe()).train()
    assert steps_in(tmp_path / "run") == [1, 2, 4, 6]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (1, "bf16")])
def test_a_moving_average_is_kept_and_goes_on(recipe, tmp_path, stage, precision):
    changes = {"optimizer__ema": 0.5, "parallel__zero_stage": stage, "train__precision": precision}
    changes |= {"checkpoint__every": 1, "schedule__type": "constant"}
    Trainer(recipe(train__steps=3, **changes)).train()
    Trainer(recipe(train__steps=5, **changes)).train()
    run = tmp_path / "run"
    name = "model.layers.0.mlp.down_proj.weight"
    average = checkpoint.load_weights(run, 1, kind="ema")[name]
    for step in range(2, 6):
        average = average.lerp(checkpoint.load_weights(run, step)[name], 0.5)
        torch.testing.assert_close(checkpoint.load_weights(run, step, kind="ema")[name], average)
    derived.convert(run, tmp_path / "ema", kind="ema")
    assert torch.equal(checkpoint.load_weights(tmp_path / "ema")[name], checkpoint.load_weights(run, kind="ema")[name])
    with pytest.raises(UserError, match="exists already"):
        derived.convert(run, tmp_path / "ema")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(folder / "recipe.yaml", corpus, **{**OPTIONS, "train__validate_every": 2})
    Trainer(load_recipe(path)).train()
    return folder / "run"


def test_the_last_ones_are_averaged_and_exported(trained, tmp_path, capsys):
    assert [path.name[-1] for path in derived.average(trained, tmp_path / "mean", 3)] == ["6", "4", "2"]
    mean = checkpoint.load_weights(tmp_path / "mean")
    each = [checkpoint.load_weights(trained, step) for step in (2, 4, 6)]
    assert mean.keys() == each[0].keys()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, torch.stack([weights[name] for weights in each]).mean(0))
    export_run(tmp_path / "mean", tmp_path / "export")
    exported = load_trained(tmp_path / "export").model.state_dict()["model.norm.weight"]
    torch.testing.assert_close(exported.float(), mean["model.norm.weight"])
    with pytest.raises(UserError, match="4 checkpoints are wanted, there are those of: 2, 4, 6"):
        derived.average(trained, tmp_path / "other", 4)
    assert not (tmp_path / "other").exists()


def test_an_average_is_no_start_with_moments(trained, tmp_path, corpus):
    derived.average(trained, tmp_path / "mean", 2)
    init = {"from": str(tmp_path / "mean"), "keep": ["optimizer"]}
    path = write_recipe(tmp_path / "recipe.yaml", corpus, **OPTIONS, init=init)
    with pytest.raises(UserError, match="holds weights alone"):
        Trainer(load_recipe(path))


def test_checkpoints_are_listed_and_verified(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    lines = listing.table(run).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["step-00000002", "step-00000004", "step-00000006"]
    losses = [line["validation_loss"] for line in read_metrics(run)[1][1:]]
    assert [line.split()[2] for line in lines[1:]] == [f"{loss:.4f}" for loss in losses]
    assert all("every hash is right" in line for line in listing.verify(run))
    file = run / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000004: rank-00000\.safetensors: the content differs.*; sound: step-"):
        listing.verify(run)
    with pytest.raises(UserError, match="expected a run folder with checkpoints"):
        listing.table(tmp_path)


def test_a_file_holds_no_more_than_it_says(trained):
    """Every element of every parameter, once, and by the name that the model gives it."""
    files = TensorFiles(checkpoint.find(trained))
    model = load_trained(trained).model
    assert files.parameters.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(files.whole(name, "weight"), parameter.detach().float())
        assert sorted(files.parameters[name].kinds) == ["exp_avg", "exp_avg_sq", "weight"]


def test_the_program_does_all_of_it(trained, tmp_path, capsys):
    module = program("checkpoint")
    for words in (
        ["list", trained],
        ["verify", trained],
        ["average", trained, tmp_path / "mean", "--last", "2"],
        ["convert", trained, tmp_path / "one", "--step", "4"],
    ):
        module.main(module.build_parser().parse_args([str(word) for word in words]))
    said = capsys.readouterr().out
    assert "step-00000002: complete, every hash is right" in said
    assert f"{tmp_path / 'mean'}: the mean of step-00000004, step-00000006" in said
    ours, theirs = checkpoint.load_weights(tmp_path / "one"), checkpoint.load_weights(trained, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="holds no ema, but exp_avg, exp_avg_sq, weight"):
        module.main(module.build_parser().parse_args(["convert", str(trained), str(tmp_path / "ema"), "--ema"]))
