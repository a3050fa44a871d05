"""Stages of a run, and runs that branch off another with what they keep."""

import copy

import pytest
import torch
import yaml
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.huggingface.export import export_run
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.tensor_files import TensorFiles
from dash_train.training.trainer import Trainer, train

COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash", "density")
OPTIONS = {"train__validate_every": 0, "checkpoint__every": 100, "optimizer__weight_decay": 0.5}
KEEP = ["optimizer", "schedule", "data"]
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 64}
BASE = {"train": {"seq": 512, "global_batch_size": 4, "micro_batch_size": 2}}
LONGER = {
    "train": {"seq": 1024, "global_batch_size": 2, "micro_batch_size": 1},
    "model": {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq": 512}},
}
LONGEST = {
    "train": {"seq": 2048, "global_batch_size": 1, "micro_batch_size": 1},
    "model": {"rope_theta": 1e6, "rope_scaling": None, "attention": {"routing_block": 4, "routing_window": 2}},
    "optimizer": {"lr": 1e-3},
}


def without_steps(path):
    """The recipe without train.steps, which the stages give."""
    recipe = yaml.safe_load(path.read_text())
    del recipe["train"]["steps"]
    path.write_text(yaml.safe_dump(recipe))
    return path


def lines(run_dir):
    return [{key: line[key] for key in COMPARED} for line in read_metrics(run_dir)[0]]


def by_hand(folder, corpus, number, changes, steps, **more):
    """The recipe of one of several runs, each of which starts from the one before."""
    sections = {name: values for name, values in changes.items() if name != "train"}
    own = sections.pop("model", {})
    model = {**SHAPE, **own, "attention": {"chunk_size": 16, **own.get("attention", {})}}
    options = {f"{name}__{key}": value for name, values in sections.items() for key, value in values.items()}
    options |= {f"train__{key}": value for key, value in changes["train"].items()}
    if number:
        options["init"] = {"from": str(folder / str(number - 1) / "run"), "keep": KEEP}
    options = {**OPTIONS, "model": model, **options, **more}
    recipe = write_recipe(folder / str(number) / "recipe.yaml", corpus, **options)
    return load_recipe(recipe, [f"train.steps={steps}", "schedule.steps=8"])


def test_a_staged_run_equals_the_same_runs_by_hand(tmp_path, corpus):
    """512 -> 1,024 -> 2,048 tokens, stopped and resumed inside the second stage."""
    changes = [BASE, LONGER, LONGEST]
    stages = [{"steps": steps, **stage} for steps, stage in zip((3, 3, 2), changes, strict=True)]
    model = {**SHAPE, "attention": {"chunk_size": 16}}
    staged = write_recipe(tmp_path / "staged" / "recipe.yaml", corpus, **OPTIONS, model=model, stages=stages)
    without_steps(staged)
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.train_step

        def stopping(self, *arguments):
            metrics = step(self, *arguments)
            self.stop.received = "SIGTERM" if self.step == 4 else None
            return metrics

        patch.setattr(Trainer, "train_step", stopping)
        train(load_recipe(staged))
    assert checkpoint.load_state(checkpoint.find(tmp_path / "staged" / "run")).step == 4
    train(load_recipe(tmp_path / "staged" / "run" / "recipe.yaml"))
    last = checkpoint.load_state(checkpoint.find(tmp_path / "staged" / "run"))
    assert (last.step, last.stage, last.optimizer_steps) == (8, 2, 8)
    seen = []
    for number, (change, steps) in enumerate(zip(changes, (3, 6, 8), strict=True)):
        train(by_hand(tmp_path / "hand", corpus, number, copy.deepcopy(change), steps))
        seen += lines(tmp_path / "hand" / str(number) / "run")
    assert lines(tmp_path / "staged" / "run") == seen
    assert [line["step"] for line in seen] == list(range(1, 9))
    ours, theirs = (TensorFiles(checkpoint.find(tmp_path / name / "run")) for name in ("staged", "hand/2"))
    for name in ours.parameters:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.read(name, kind), theirs.read(name, kind)), (name, kind)
    export_run(tmp_path / "staged" / "run", tmp_path / "export")


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("base")
    train(by_hand(folder, corpus, 0, BASE, 4))
    return folder


@pytest.mark.parametrize("keep", [[], ["optimizer"], ["schedule"], ["data"], KEEP])
def test_a_branch_keeps_what_it_names(base, corpus, tmp_path, keep):
    recipe = by_hand(tmp_path, corpus, 0, BASE, 8, init={"from": str(base / "0" / "run"), "keep": keep})
    trainer = Trainer(recipe)
    found = checkpoint.find(base / "0" / "run")
    files, state = TensorFiles(found), checkpoint.load_state(found)
    moments = trainer.engine.optimizer.optimizer.state
    assert bool(moments) == ("optimizer" in keep)
    assert trainer.step == (4 if "schedule" in keep else 0)
    assert trainer.progress.rows == (16 if "data" in keep else 0)
    assert trainer.progress.tokens == (state.tokens if "data" in keep else 0)
    for name, weight in trainer.engine.module.named_parameters():
        assert torch.equal(weight.detach(), files.whole(name, "weight")), name


def test_what_is_kept_is_settled_at_the_start(base, corpus, tmp_path):
    init = {"from": str(base / "0" / "run"), "keep": ["data"]}
    train(by_hand(tmp_path, corpus, 0, BASE, 2, init=init))
    for other in ({**init, "keep": KEEP}, {}):
        with pytest.raises(UserError, match=r"init\.(keep|from) is .* there and .* here; it had its effect"):
            Trainer(by_hand(tmp_path, corpus, 0, BASE, 4, init=other))


def test_full_attention_becomes_dash_with_its_moments(base, corpus, tmp_path):
    full = {**BASE, "model": {"attention": {"type": "full"}}}
    train(by_hand(tmp_path, corpus, 0, copy.deepcopy(full), 3))
    dash = {**LONGER, "model": {**LONGER["model"], "attention": {"type": "dash"}}}
    trainer = Trainer(by_hand(tmp_path, corpus, 1, copy.deepcopy(dash), 5))
    scales = trainer.model_config.attention.routing_scale
    assert isinstance(scales, list) and scales[0] != 1.0, "calibrated on the weights that were taken over"
    trainer.train()
    assert [line["step"] for line in lines(tmp_path / "1" / "run")] == [4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"steps": 3}]}, r"train.steps \(6\) is not the sum of the stages' \(3\)"),
        ({"init__keep": ["data"]}, "keep: needs init.from"),
        ({"stages": [{"steps": 6, "train": {"seqq": 1}}]}, "stages.0: train.seqq: unknown key; did you mean train.seq"),
        ({"stages": [{"steps": 6, "train": {"seq": 100}}]}, r"stages.0: train.seq \(100\) must be a multiple"),
    ],
)
def test_stages_that_make_no_recipe_are_refused(corpus, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **changes))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stages_may_change_how_the_work_is_spread(corpus, tmp_path, stage):
    """And each engine makes room for the next."""
    model = {**SHAPE, "attention": {"chunk_size": 16}}
    stages = [{"steps": 2}, {"steps": 2, "parallel": {"zero_stage": stage}}, {"steps": 2}]
    Trainer(load_recipe(write_recipe(tmp_path / "whole" / "recipe.yaml", corpus, **OPTIONS, model=model))).train()
    train(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **OPTIONS, model=model, stages=stages)))
    whole, staged = (lines(folder / "run") for folder in (tmp_path / "whole", tmp_path))
    for one, other in zip(whole, staged, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert {k: one[k] for k in ("lr", "rows_hash", "tokens")} == {
            k: other[k] for k in ("lr", "rows_hash", "tokens")
        }


def test_an_export_has_nothing_to_keep(base, corpus, tmp_path):
    export_run(base / "0" / "run", tmp_path / "export")
    recipe = by_hand(tmp_path, corpus, 0, BASE, 8, init={"from": str(tmp_path / "export"), "keep": ["optimizer"]})
    with pytest.raises(UserError, match="is an exported folder, which holds weights alone"):
        Trainer(recipe)


def test_stages_that_are_over_cannot_change(corpus, tmp_path):
    model = {**SHAPE, "attention": {"chunk_size": 16}}
    path = write_recipe(tmp_path / "recipe.yaml", corpus, **OPTIONS, model=model, stages=[{"steps": 2}, {"steps": 4}])
    train(load_recipe(path))
    with pytest.raises(UserError, match="steps of stages that are over cannot change"):
        train(load_recipe(path, ["stages.0.steps=8", "train.steps=12"]))


def test_a_stage_with_other_text_keeps_the_tokenizer(corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("".join(f"line {number} of another text\n" for number in range(9000)))
    (other / "b.txt").write_text("".join(f"and {number} more\n" for number in range(9000)))
    source = {"type": "text", "path": str(other)}
    model = {**SHAPE, "attention": {"chunk_size": 16}}
    stages = [{"steps": 2}, {"steps": 4, "data": {"sources": [source]}}]
    path = write_recipe(tmp_path / "recipe.yaml", corpus, **OPTIONS, model=model, stages=stages)
    train(load_recipe(path))
    before, after = (
        checkpoint.load_state(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").fingerprint for step in (2, 6)
    )
    assert before["tokenizer"] == after["tokenizer"]
    assert before["shards"] != after["shards"]
