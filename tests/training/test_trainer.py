import itertools
import json
import logging
import math
import shutil
import subprocess
import sys
from contextlib import closing

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from tiny_runs import write_recipe

from dash_train.data.errors import DataError
from dash_train.data.loader import IGNORE, step_batches
from dash_train.errors import UserError
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint, saving
from dash_train.training.engine import grad_norm
from dash_train.training.optimizer import parameter_groups
from dash_train.training.schedule import lr_factor
from dash_train.training.trainer import Trainer

FIXED_SCALE = {"chunk_size": 16, "routing_scale": 500.0}
SHAPE = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mlp_size": 64,
    "tie_embeddings": True,
}
FIXED = {**SHAPE, "attention": FIXED_SCALE}
MIXED = {**FIXED_SCALE, "type": ["dash", "full"], "routing_block": 4, "routing_window": 9}


@pytest.fixture
def train(tmp_path, corpus):
    """Runs a tiny recipe in this process; returns its training and validation lines."""

    def run(name="run", **overrides):
        recipe = load_recipe(write_recipe(tmp_path / name / "recipe.yaml", corpus, **overrides))
        Trainer(recipe).train()
        return read_metrics(tmp_path / name / "run")

    return run


def plain_training(recipe, rows):
    """Losses, gradient norms and the first moments after a step, by plain PyTorch, the whole batch at once."""
    torch.manual_seed(recipe.train.seed)
    model = LanguageModel(recipe.model)
    options = recipe.optimizer
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    size = recipe.train.global_batch_size
    losses, norms, first = [], [], {}
    batches = step_batches(rows, global_batch_size=size, micro_batch_size=size, rank=0, world=1)
    for step, batch in zip(range(recipe.train.steps), batches, strict=False):
        micro = batch.micro_batches[0]
        loss = model(**micro)["loss"] / (micro["labels"] != IGNORE).sum()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(step, recipe.train.steps, recipe.schedule)
        optimizer.step()
        first = first or {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        losses.append(loss.item())
    batches.close()
    return losses, norms, first


def first_moments(trainer, monkeypatch):
    """Filled after the first optimizer step with AdamW's first moments: (1 - beta) times the clipped gradients."""
    moments, step = {}, trainer.engine.step

    def watched():
        step()
        for name, parameter in () if moments else trainer.engine.module.named_parameters():
            moments[name] = first_moment(trainer.engine.optimizer, parameter).clone()

    monkeypatch.setattr(trainer.engine, "step", watched)
    return moments


def first_moment(optimizer, parameter):
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0
        return optimizer.state[parameter]["exp_avg"]
    if hasattr(parameter, "ds_id"):  # stage 3
        return safe_get_full_optimizer_state(parameter, "exp_avg")
    flat = optimizer.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
    place = parameter._hp_mapping.hp_fragment_address
    return optimizer.optimizer.state[flat]["exp_avg"].narrow(0, place.start, place.numel).view(parameter.shape)


def weights_of(trainer):
    """Copies of the whole weights, also of those that ZeRO-3 holds in parts."""
    parameters = dict(trainer.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


OFFLOADED = {"parallel__offload_optimizer": "cpu"}
SAVINGS = {
    "stage 0": {"parallel__zero_stage": 0},
    "stage 1": {"parallel__zero_stage": 1, "train__activation_checkpointing": "selective"},
    "stage 2": {"parallel__zero_stage": 2, "train__activation_checkpointing": "full"},
    "stage 3": {"parallel__zero_stage": 3, "train__activation_checkpointing": "full"},
    "stage 3, selective": {"parallel__zero_stage": 3, "train__activation_checkpointing": "selective"},
    "stage 1, optimizer offloaded": {"parallel__zero_stage": 1, **OFFLOADED},
    "stage 2, optimizer offloaded": {"parallel__zero_stage": 2, **OFFLOADED},
    "all that there is": {
        "parallel__zero_stage": 3,
        **OFFLOADED,
        "parallel__offload_parameters": "cpu",
        "train__activation_checkpointing": "full",
        "train__activation_offload": True,
    },
}


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("saving", SAVINGS)
def test_every_saving_trains_like_plain_pytorch(tmp_path, corpus, saving, micro_batch_size, monkeypatch):
    """Losses, gradient norms and the first step's clipped gradients, with an accumulation of one and of two."""
    options = {"train__micro_batch_size": micro_batch_size, "model": {**FIXED, "attention": MIXED}, **SAVINGS[saving]}
    small = {"optimizer__grad_clip": 0.25, "train__validate_every": 0, "train__steps": 4}
    partition = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if SAVINGS[saving]["parallel__zero_stage"] == 3:
        options["deepspeed"] = partition
    trainer = Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options, **small)))
    losses, norms, moments = plain_training(trainer.recipe, trainer.training_rows)
    monkeypatch.setattr("dash_train.model.transformer.MLP_TOKENS", 50)
    monkeypatch.setattr("dash_train.model.loss.CHUNK_LOGITS", 100 * 512)
    measured = first_moments(trainer, monkeypatch)
    trainer.train()
    training, _ = read_metrics(tmp_path / "run")
    assert [line["loss"] for line in training] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in training] == pytest.approx(norms, rel=1e-5)
    assert norms[0] > 0.25, "clipping must have been at work"
    assert measured.keys() == moments.keys()
    for name, moment in moments.items():
        assert (measured[name] - moment).norm() <= 1e-5 * moment.norm(), name


def test_bf16_stages_agree(train):
    curves = []
    for stage in (1, 2, 3):
        training, _ = train(f"stage{stage}", train__precision="bf16", parallel__zero_stage=stage, model=FIXED)
        curves.append([line["loss"] for line in training])
    assert curves[0][-1] < curves[0][0] - 0.2
    assert curves[1] == pytest.approx(curves[0], abs=0.02)
    assert curves[2] == pytest.approx(curves[0], abs=0.02)


def test_a_run_learns_and_leaves_everything_behind(train, tmp_path):
    training, validation = train(train__steps=8, optimizer__lr=1e-2, checkpoint__keep_last=2)
    assert [line["step"] for line in training] == list(range(1, 9))
    assert [line["step"] for line in validation] == [0, 3, 6, 8]
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"] - 0.5
    bits = validation[0]["validation_bits_per_byte"]
    assert 1 < bits < validation[0]["validation_loss"] / 0.693, "a token stands for more than one byte"
    assert all(0 < density < 1 for density in training[0]["density"])
    assert all(factor >= 1 for factor in training[0]["union_factor"])
    assert all(residual < 1e-5 for residual in training[0]["residual"])
    assert training[0]["tokens_per_second"] > 0 and training[0]["memory_gb"] > 0
    run = tmp_path / "run" / "run"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000006", "step-00000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(run / "recipe.yaml").train.steps == 8
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    assert (run / "tokenizer").is_dir()


@pytest.mark.parametrize("block", [1, 16])
def test_auto_scale_gives_the_density_of_the_next_batches(tmp_path, corpus, block):
    """At the initial weights, over 16 batches that calibration has not seen; whatever the micro-batch."""
    attention = {"chunk_size": 16, "initial_density": 0.25, "routing_block": block, "routing_window": block}
    rows = {"train__seq": 1024, "train__global_batch_size": 4, "model": {**SHAPE, "attention": attention}}
    trainer, other = (
        Trainer(load_recipe(write_recipe(tmp_path / f"{size}.yaml", corpus, **rows, train__micro_batch_size=size)))
        for size in (1, 4)
    )
    assert trainer.model_config.attention.routing_scale == other.model_config.attention.routing_scale
    batches = step_batches(
        trainer.training_rows, global_batch_size=4, micro_batch_size=4, rank=0, world=1, start_step=16
    )
    densities = []
    with closing(batches), torch.no_grad():
        for batch in itertools.islice(batches, 16):
            outputs = trainer.engine.module(**batch.micro_batches[0])
            densities.append(outputs["active_chunks"] / outputs["eligible_chunks"])
    assert torch.stack(densities).mean(0).tolist() == pytest.approx([0.25, 0.25], rel=0.15)


def test_routing_survives_in_the_checkpoint(train, tmp_path):
    """And a checkpoint from before there were routing blocks has the paper's."""
    attention = {"chunk_size": 16, "routing_block": [1, 16], "routing_window": 5}
    train(train__steps=2, model={**SHAPE, "attention": attention})
    found = checkpoint.find(tmp_path / "run" / "run")
    saved = checkpoint.load_model_config(found)
    scales = saved.attention.routing_scale
    assert isinstance(scales, list) and len(scales) == 2 and scales[0] != 1.0
    assert (saved.routing_block(1), saved.routing_window(1)) == (16, 5)
    values = json.loads((found / "model.json").read_text())
    del values["attention"]["routing_block"], values["attention"]["routing_window"]
    (found / "model.json").write_text(json.dumps(values))
    before = checkpoint.load_model_config(found)
    assert (before.routing_block(1), before.routing_window(1)) == (1, 1)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16")])
def test_resume_is_exact(train, stage, precision):
    options = {"parallel__zero_stage": stage, "train__precision": precision}
    options |= {"train__steps": 6, "schedule__type": "constant"}
    whole, whole_validation = train("whole", **options)
    train("parts", **{**options, "train__steps": 4})
    parts, parts_validation = train("parts", **options)
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash", "epoch", "density")
    assert [{key: line[key] for key in keys} for line in parts] == [{key: line[key] for key in keys} for line in whole]
    assert parts_validation[-1] == whole_validation[-1]


def test_a_broken_checkpoint_is_skipped(train, tmp_path, caplog):
    train(train__steps=4)
    folder = tmp_path / "run" / "run" / "checkpoints"
    (folder / "step-00000004" / "manifest.json").unlink()
    with caplog.at_level(logging.INFO):
        train(train__steps=4)
    assert "step-00000004 is skipped: it has no manifest.json" in caplog.text
    assert f"resuming from {folder / 'step-00000002'}" in caplog.text


def test_only_damaged_checkpoints_are_no_fresh_start(train, tmp_path):
    train(train__steps=2)
    shard = tmp_path / "run" / "run" / "checkpoints" / "step-00000002" / SHARD
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name}: the content differs from the manifest's hash"):
        train(train__steps=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, corpus):
    """The folder of the checkpoints of steps 2 and 4 of a run."""
    folder = tmp_path_factory.mktemp("saved")
    Trainer(load_recipe(write_recipe(folder / "recipe.yaml", corpus, train__steps=4, train__validate_every=0))).train()
    return folder / "run" / "checkpoints"


def flip_a_digit(file):
    text = bytearray(file.read_bytes())
    place = next(i for i, byte in enumerate(text) if 48 <= byte <= 56)
    text[place] += 1
    file.write_bytes(text)


def as_folder(file):
    file.unlink()
    file.mkdir()


def without(name):
    def change(file):
        manifest = json.loads(file.read_text())
        del manifest["files"][name]
        file.write_text(json.dumps(manifest))

    return change


SHARD = "rank-00000.safetensors"
DAMAGES = [("manifest.json", content) for content in (b"null", b"[]", b"{}", b"\xff\xfe{}", b"[" * 100000, b"")]
DAMAGES += [
    ("manifest.json", b'{"format": 1, "files": ["state.json"]}'),
    ("manifest.json", b'{"format": 3, "files": {}}'),
]
PARTS = ("state.json", "model.json", "index.json", SHARD)
DAMAGES += [("manifest.json", without(name)) for name in PARTS]
DAMAGES += [(name, damage) for name in PARTS for damage in (flip_a_digit, as_folder)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(checkpoints, tmp_path, caplog, name, damage):
    folder = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    file = folder / "step-00000004" / name
    file.write_bytes(damage) if isinstance(damage, bytes) else damage(file)
    assert checkpoint.newest(folder) == folder / "step-00000002"
    assert "step-00000004 is skipped" in caplog.text
    assert name in caplog.text
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load_weights(folder / "step-00000004")


def test_folders_of_other_names_are_neither_read_nor_removed(train, tmp_path, caplog):
    train(train__steps=2)
    folder = tmp_path / "run" / "run" / "checkpoints"
    mine = [shutil.copytree(folder / "step-00000002", folder / name) for name in ("step-00000002-best", "step-final")]
    (folder / ".old-step-00000001").mkdir()
    with caplog.at_level(logging.INFO):
        train(train__steps=8)
    assert f"resuming from {folder / 'step-00000002'}\n" in caplog.text
    left = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert left == ["step-00000002-best", "step-00000006", "step-00000008", "step-final"]
    assert checkpoint.load_weights(mine[0])
    with pytest.raises(UserError, match="no checkpoint of step 3; there are those of: 6, 8"):
        checkpoint.find(tmp_path / "run" / "run", 3)


@pytest.mark.parametrize(("stage", "precision"), [*((stage, "fp32") for stage in range(4)), (1, "bf16")])
def test_a_resume_takes_the_recipe_of_the_optimizer(tmp_path, corpus, stage, precision):
    options = {"parallel__zero_stage": stage, "train__precision": precision, "train__validate_every": 0, "model": FIXED}
    path = tmp_path / "recipe.yaml"
    Trainer(load_recipe(write_recipe(path, corpus, train__steps=2, **options))).train()
    other = {"weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6, "grad_clip": 0.5}
    changes = {f"optimizer__{name}": value for name, value in other.items()}
    trainer = Trainer(load_recipe(write_recipe(path, corpus, train__steps=3, **options, **changes)))
    assert trainer.step == 2
    groups = trainer.engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all((tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-6) for group in groups)
    optimizer = trainer.engine.optimizer
    assert (optimizer.grad_clip if stage == 0 else optimizer.clip_grad) == 0.5
    trainer.train()


def test_another_batch_size_neither_repeats_nor_skips_rows(train, tmp_path):
    options = {"train__validate_every": 0, "checkpoint__every": 1, "checkpoint__keep_last": 9}
    train(train__steps=2, **options)
    training, _ = train(train__steps=4, train__global_batch_size=4, **options)
    folder = tmp_path / "run" / "run" / "checkpoints"
    assert [checkpoint.load_state(folder / f"step-{step:08d}").rows for step in range(1, 5)] == [8, 16, 20, 24]
    whole, _ = train("whole", train__steps=6, train__global_batch_size=4, **options)
    assert [line["rows_hash"] for line in training[2:]] == [line["rows_hash"] for line in whole[4:]]
    (folder / "step-00000004" / "manifest.json").unlink()
    state = json.loads((folder / "step-00000003" / "state.json").read_text())
    del state["rows"]
    (folder / "step-00000003" / "state.json").write_text(json.dumps(state))
    assert checkpoint.load_state(folder / "step-00000003").rows == 12, "as it was counted before"


def test_a_streak_of_skipped_steps_is_never_saved(tmp_path, corpus, monkeypatch):
    options = {"train__steps": 20, "train__validate_every": 0, "train__max_nonfinite_steps": 5, "checkpoint__every": 1}
    trainer = Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options)))
    healthy = trainer.engine.backward

    def diverging(loss, **options):
        healthy(loss * (float("nan") if trainer.step in (2, *range(4, 20)) else 1), **options)

    monkeypatch.setattr(trainer.engine, "backward", diverging)
    with pytest.raises(UserError, match="the last good step was 4, and the same command resumes from that of step 4"):
        trainer.train()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000002", "step-00000004"]


def test_a_run_folder_belongs_to_one_process(tmp_path, corpus):
    path = write_recipe(tmp_path / "recipe.yaml", corpus)
    (tmp_path / "run").mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    facts = 'f.write(\'{"host": "node7", "pid": 4711, "since": \' + str(time.time() - 300) + "}"); f.flush()'
    command = [sys.executable, "-c", hold.replace("print", facts + "; print") + "; time.sleep(60)"]
    holder = subprocess.Popen([*command, str(tmp_path / "run" / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    with pytest.raises(UserError, match=r"run_dir: .* is in use by process 4711 on node7, for 5 min"):
        Trainer(load_recipe(path))
    holder.kill()
    holder.communicate()
    Trainer(load_recipe(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__sources": [{"type": "text", "path": "/nowhere/*.txt"}]}, "no text file here"),
        ({"model": {**SHAPE, "vocab_size": 64}}, "is smaller than the tokenizer's"),
        ({"tracking__wandb": "online"}, "tracking.wandb: online needs a key"),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, corpus, changes, message, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises((UserError, DataError), match=message):
        Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**SHAPE, "layers": 3}}, "model.layers is 2 there and 3 here"),
        ({"train__seq": 256}, "the data differs: train.seq is 128 there and 256 here"),
        ({"train__seed": 2}, "train.seed is 0 there and 2 here"),
        ({"train__steps": 1, "schedule__warmup_steps": 0}, "step 2 is past train.steps (1)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(train, changes, message):
    train(train__steps=2)
    with pytest.raises(UserError) as error:
        train(**{"train__steps": 4, **changes})
    assert message in str(error.value)


def test_what_a_resume_changes_is_logged(train, tmp_path, caplog):
    train(train__steps=2)
    blocks = {"chunk_size": 16, "routing_block": [1, 16]}
    with caplog.at_level(logging.INFO):
        train(train__steps=4, optimizer__lr=1e-4, model={**SHAPE, "attention": blocks})
    assert "optimizer.lr was 0.003, is 0.0001" in caplog.text
    assert "model.attention.routing_block was 1, is [1, 16]" in caplog.text
    found = checkpoint.load_model_config(checkpoint.find(tmp_path / "run" / "run"))
    assert found.attention.routing_block == [1, 16]


@pytest.mark.parametrize(("stage", "precision"), [*((stage, "fp32") for stage in range(4)), (1, "bf16")])
def test_non_finite_gradients_skip_the_step_and_stop_the_run(tmp_path, corpus, stage, precision, monkeypatch):
    options = {"parallel__zero_stage": stage, "train__precision": precision, "train__max_nonfinite_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", corpus, model=FIXED, **options)
    trainer = Trainer(load_recipe(path))
    batches = step_batches(trainer.training_rows, global_batch_size=8, micro_batch_size=2, rank=0, world=1)
    trainer.train_step(batches)
    before = weights_of(trainer)
    healthy = trainer.engine.backward
    monkeypatch.setattr(trainer.engine, "backward", lambda loss, **options: healthy(loss * float("nan"), **options))
    metrics = trainer.train_step(batches)
    assert metrics["skipped_steps"] == 1
    assert not math.isfinite(grad_norm(trainer.engine))
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="2 steps in a row had a non-finite gradient"):
        trainer.train_step(batches)
    monkeypatch.undo()
    assert trainer.train_step(batches)["loss"] < 10
    batches.close()


def test_no_space_left_keeps_earlier_checkpoints(train, tmp_path, monkeypatch):
    train(train__steps=2)
    folder = tmp_path / "run" / "run" / "checkpoints"

    def full_disk(path, tensors):
        path.write_bytes(bytes(100))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write", full_disk)
    with pytest.raises(UserError, match=r"step-00000004: the checkpoint could not be written .*No space left"):
        train(train__steps=4)
    monkeypatch.undo()
    assert checkpoint.newest(folder) == folder / "step-00000002"
    training, _ = train(train__steps=4)
    assert checkpoint.newest(folder) == folder / "step-00000004"
    assert not list(folder.glob(".tmp-*"))
    assert training[-1]["step"] == 4


def test_the_batch_must_divide_over_the_ranks(train):
    with pytest.raises(UserError, match=r"must be a multiple of train\.micro_batch_size"):
        train(train__micro_batch_size=3)


STAGES = [("fp32", {"zero_stage": 0})]
STAGES += [(precision, {"zero_stage": stage}) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
STAGES += [("bf16", {"zero_stage": 1, "offload_optimizer": "cpu"})]


@pytest.mark.parametrize(("precision", "parallel"), STAGES)
def test_weights_of_a_checkpoint_are_those_of_the_model(tmp_path, corpus, precision, parallel):
    path = write_recipe(
        tmp_path / "recipe.yaml",
        corpus,
        model={**SHAPE, "tie_embeddings": True},
        parallel=parallel,
        train__precision=precision,
        train__steps=2,
        train__validate_every=0,
    )
    trainer = Trainer(load_recipe(path))
    trainer.train()
    saved = checkpoint.load_weights(tmp_path / "run")
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    held = weights_of(trainer)
    assert saved.keys() == held.keys() | {"lm_head.weight"}
    for name, weight in held.items():
        torch.testing.assert_close(saved[name].to(weight.dtype), weight, rtol=0, atol=0)
    assert any(not torch.equal(saved[name], weight.float()) for name, weight in held.items()) == (precision == "bf16")
