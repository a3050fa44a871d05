"""Muon on every ZeRO stage and number of ranks against torch's own on whole matrices."""

import json

import pytest
import torch
from ranks import run_on_ranks
from tiny_runs import write_recipe

from dash_train.data.loader import IGNORE, step_batches
from dash_train.errors import UserError
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import muon
from dash_train.training.muon import orthogonal
from dash_train.training.optimizer import muon_groups
from dash_train.training.schedule import lr_factor
from dash_train.training.trainer import Trainer

SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 64}
OPTIONS = {
    "model": {**SHAPE, "attention": {"chunk_size": 16, "routing_scale": 50.0}},
    "optimizer": {"type": "muon", "lr": 1e-2, "grad_clip": 0.3, "weight_decay": 0.2},
    "train__steps": 5,
    "train__validate_every": 0,
    "checkpoint__every": 100,
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_it_is_torchs(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    groups = [{"params": [ours], "muon": True, "weight_decay": 0.1}]
    mine = muon.Muon(groups, momentum=0.9, lr=0.02, fused=True)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    spread = torch.linalg.svdvals(orthogonal(torch.randn(shape))) / (0.2 * max(shape) ** 0.5)
    assert spread.min() > 0.5 and spread.max() < 1.5


def plain_training(recipe, rows):
    """Losses by torch's Muon and AdamW on whole weights, whole batches at once."""
    torch.manual_seed(recipe.train.seed)
    model = LanguageModel(recipe.model)
    options, size = recipe.optimizer, recipe.train.global_batch_size
    matrices, *others = muon_groups(model, options.weight_decay)
    optimizers = [
        torch.optim.Muon(matrices["params"], weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{k: v for k, v in g.items() if k != "muon"} for g in others], betas=options.betas),
    ]
    losses = []
    batches = step_batches(rows, global_batch_size=size, micro_batch_size=size, rank=0, world=1)
    for step, batch in zip(range(recipe.train.steps), batches, strict=False):
        micro = batch.micro_batches[0]
        loss = model(**micro)["loss"] / (micro["labels"] != IGNORE).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(step, recipe.train.steps, recipe.schedule)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    batches.close()
    return losses


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("plain")
    recipe = load_recipe(write_recipe(folder / "recipe.yaml", corpus, **OPTIONS))
    trainer = Trainer(recipe)
    return plain_training(trainer.recipe, trainer.training_rows)


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_trains_like_plain_torch(tmp_path, corpus, expected, stage):
    path = write_recipe(tmp_path / "recipe.yaml", corpus, **OPTIONS, parallel={"zero_stage": stage})
    Trainer(load_recipe(path)).train()
    assert [line["loss"] for line in read_metrics(tmp_path / "run")[0]] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3


def train_all(rank, folder, corpus):
    """On two ranks: every stage, and the first half of a run of which one rank takes the second."""
    muon.AT_ONCE = 3000  # some matrices a time
    for stage in range(4):
        path = write_recipe(
            folder / f"{stage}" / f"recipe-{rank}.yaml", corpus, **OPTIONS, parallel={"zero_stage": stage}
        )
        Trainer(load_recipe(path)).train()
    path = write_recipe(folder / "half" / f"recipe-{rank}.yaml", corpus, **OPTIONS, parallel={"zero_stage": 3})
    Trainer(load_recipe(path, ["train.steps=2", "schedule.steps=5"])).train()


def test_two_ranks_train_like_plain_torch(tmp_path, corpus, expected):
    run_on_ranks(2, train_all, tmp_path, corpus)
    for stage in range(4):
        losses = [line["loss"] for line in read_metrics(tmp_path / str(stage) / "run")[0]]
        assert losses == pytest.approx(expected, abs=1e-4), stage
    path = write_recipe(tmp_path / "half" / "recipe.yaml", corpus, **OPTIONS, parallel={"zero_stage": 2})
    Trainer(load_recipe(path)).train()
    assert [line["loss"] for line in read_metrics(tmp_path / "half" / "run")[0]] == pytest.approx(expected, abs=1e-4)
    index = json.loads(next((tmp_path / "half" / "run" / "checkpoints").glob("*/index.json")).read_text())["parameters"]
    assert index["model.layers.0.mlp.down_proj.weight"]["kinds"] == ["momentum_buffer", "weight"]
    assert index["lm_head.weight"]["kinds"] == ["exp_avg", "exp_avg_sq", "weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"zero_stage": 2, "offload_optimizer": "cpu"}}, "optimizer.type muon needs parallel.offload_opt"),
        ({"optimizer": {"momentum": 0.9}}, r"optimizer\.momentum is Muon's"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(tmp_path, corpus, changes, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **{**OPTIONS, **changes}))
