import pytest
from ranks import run_on_ranks
from tiny_runs import write_recipe

from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training.trainer import Trainer

SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 64}
KEYS = ("router_grad_norm_q", "grad_norm_chunk_query")


def run(folder, corpus, **overrides):
    attention = {"chunk_size": 16, "routing_scale": 500.0, "type": ["dash", "full"], "routing_window": 5}
    options = {
        "model": {**SHAPE, "attention": attention},
        "train__validate_every": 0,
        "train__steps": 4,
        "tracking": {"router_gradients_every": 2},
    }
    Trainer(load_recipe(write_recipe(folder / "recipe.yaml", corpus, **{**options, **overrides}))).train()
    return read_metrics(folder / "run")[0]


def test_norms_are_logged_and_do_not_depend_on_how_the_step_is_cut(tmp_path, corpus):
    whole = run(tmp_path / "whole", corpus, train__micro_batch_size=8)
    parts = run(tmp_path / "parts", corpus, train__activation_checkpointing="full", parallel__zero_stage=2)
    assert [KEYS[0] in line for line in whole] == [False, True, False, True]
    for key in KEYS:
        for one, other in zip(whole[1::2], parts[1::2], strict=True):
            assert one[key][0] > 0 and one[key][1] is None, "the second layer does not route"
            assert one[key][0] == pytest.approx(other[key][0], rel=1e-3)
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] > 0


@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_norms_do_not_depend_on_how_many_ranks_share_a_row(tmp_path, corpus, method):
    whole = run(tmp_path / "whole", corpus, train__steps=2)
    run_on_ranks(2, run_shared, tmp_path / "shared", corpus, method)
    shared = read_metrics(tmp_path / "shared" / "run")[0]
    for key in KEYS:
        assert shared[-1][key][0] == pytest.approx(whole[-1][key][0], rel=1e-3)


def run_shared(_rank, folder, corpus, method):
    run(folder, corpus, train__steps=2, parallel={"context": 2, "context_method": method, "zero_stage": 1})
