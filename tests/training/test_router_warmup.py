"""From full attention to Dash: layers attend to everything while their routers learn, then they switch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import write_recipe

from dash_train.huggingface.export import export_run
from dash_train.model.router_warmup import learn_routing
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer

Build = Callable[..., LanguageModel]


def rows() -> dict[str, torch.Tensor]:
    """Two rows of 96 tokens, the second of two documents, with labels."""
    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 96))
    starts = torch.zeros(2, 96, dtype=torch.int32)
    starts[1, 48:] = 48
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "document_starts": starts}


@pytest.mark.parametrize("kind", ["dash", "mixed", "blocks"])
def test_a_warm_up_attends_to_everything(kind: str, tiny_model: Build) -> None:
    """The loss and all gradients are full attention's; chunk_query's is the routers' own."""
    model, full = tiny_model(kind), tiny_model("full")
    full.load_state_dict({name: weight for name, weight in model.state_dict().items() if "chunk_query" not in name})
    model.model.router_warmup = True
    for one in (model, full):
        one(**rows())["loss"].backward()
    expected = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("chunk_query"):
            assert parameter.grad.abs().max() > 0
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad)
    assert all(
        0 < layer.self_attn.router_error < 1 for layer in model.model.layers if hasattr(layer.self_attn, "chunk_query")
    )


def test_a_router_learns_where_attention_goes() -> None:
    """One key of each chunk is what queries look for; the mean key hides it until chunk_query has found it."""
    torch.manual_seed(0)
    seq, dim = 256, 16
    direction = torch.nn.functional.normalize(torch.randn(dim), dim=0)
    starts, options = torch.zeros(2, seq, dtype=torch.int32), {"chunk_size": 16, "routing_scale": 1.0, "real": None}
    chunk_query = torch.zeros(1, dim, requires_grad=True)
    optimizer = torch.optim.Adam([chunk_query], lr=0.3)
    errors = []
    for _ in range(60):
        k = torch.randn(2, seq, 1, dim) * 0.7
        k[:, ::16, 0] = torch.rand(2, seq // 16, 1) * 12 * direction  # one token of each chunk, of any strength
        q = (direction * 4).expand(2, seq, 2, dim) + 0.1 * torch.randn(2, seq, 2, dim)
        rows = {"routing_block": 1, "positions": torch.arange(seq), "document_starts": starts}
        out, error = learn_routing(torch.zeros(1, requires_grad=True), q, q, k, chunk_query, **options, **rows)
        optimizer.zero_grad()
        out.sum().backward()
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < sum(errors[:5]) * 0.6, errors
    assert torch.nn.functional.cosine_similarity(chunk_query[0], direction, dim=0) > 0.5


def test_a_run_switches_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Full attention for the warm-up's steps, then routers with scales of their own; a resume within it is the same."""
    full = write_recipe(tmp_path / "full/recipe.yaml", corpus, train__steps=3, train__validate_every=0)
    Trainer(load_recipe(full, ["model.attention.type=full"])).train()
    export_run(tmp_path / "full/run", tmp_path / "export")

    def trainer(name: str, *changes: str) -> Trainer:
        path = write_recipe(
            tmp_path / name / "recipe.yaml",
            corpus,
            init={"from": str(tmp_path / "export")},
            train__steps=5,
            train__validate_every=0,
            checkpoint__every=1,
        )
        warm_up = ["model.attention.type=dash", "model.attention.router_warmup_steps=3"]
        return Trainer(load_recipe(path, [*warm_up, *changes]))

    run = trainer("whole")
    before = list(run.model_config.attention.routing_scale)
    run.train()
    training, _ = read_metrics(tmp_path / "whole/run")
    assert [line["density"][0] is None for line in training] == [True, True, True, False, False]
    assert ["router_error" in line for line in training] == [True, True, True, False, False]
    scales = checkpoint.load_model_config(checkpoint.find(tmp_path / "whole/run", 4)).attention.routing_scale
    assert scales != before, "settled anew, for chunk queries that have learnt"

    trainer("parts", "train.steps=2", "schedule.steps=5").train()
    trainer("parts", "train.steps=3", "schedule.steps=5").train()
    resumed = trainer("parts")
    assert not resumed.engine.module.model.router_warmup
    assert resumed.model_config.attention.routing_scale == scales
    resumed.train()
    again, _ = read_metrics(tmp_path / "parts/run")
    assert [line["loss"] for line in again] == [line["loss"] for line in training]
