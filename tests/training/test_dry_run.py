import pytest
from tiny_runs import write_recipe

from dash_train.data.errors import DataError
from dash_train.data.prepare import prepare
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.training.dry_run import dry_run
from dash_train.training.trainer import Trainer


def said(recipe, ranks=1):
    return "\n".join(dry_run(recipe, ranks))


def test_it_says_what_a_run_would_do_and_writes_nothing(tmp_path, corpus):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, data__cache=str(tmp_path / "cache")))
    text = said(recipe)
    assert "starts with weights drawn from seed 0" in text
    assert "not prepared yet" in text and "file(s)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    prepare(recipe.data)
    text = said(recipe, ranks=2)
    assert "a step: 8 rows of 128 tokens on 2 rank(s), 2 micro-batch(es) of 2" in text
    assert "memory of a rank, about: " in text and "optimizer 0.0" in text
    assert "first batch: " in text and "it begins: '" in text
    assert not (tmp_path / "run").exists()


def test_it_says_where_a_run_goes_on(tmp_path, corpus):
    options = {"train__steps": 2, "train__validate_every": 0}
    trainer = Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options)))
    trainer.train()
    stages = [{"steps": 2}, {"steps": 3, "train": {"seq": 256}}, {"steps": 1, "model": {"rope_theta": 1e6}}]
    path = write_recipe(tmp_path / "recipe.yaml", corpus, **{**options, "train__steps": 6}, stages=stages)
    text = said(load_recipe(path))
    assert f"resumes from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}: 2" in text.replace(",", "")
    assert "stage 2 of 3, to step 5:" in text and "stage 3 of 3, to step 6:" in text
    assert "stage 1 of 3" not in text, "it is over"
    assert f"{trainer.throughput.parameters:,} parameters" in text


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"data__sources": [{"type": "text", "path": "/nowhere/*.txt"}]}, 1, "no text file here"),
        ({"init__from": "/nowhere"}, 1, "init.from: /nowhere: expected a run folder"),
        ({"deepspeed": {"zero_optimisation": {}}}, 1, "did you mean deepspeed.zero_optimization"),
        ({}, 3, r"must be a multiple of train\.micro_batch_size \(2\) times the number of ranks \(3\)"),
        ({"parallel__context": 2}, 1, "2 ranks share a row, but the run has 1"),
        ({"data__tokenizer": {"path": "/nowhere"}}, 1, "/nowhere"),
    ],
)
def test_it_refuses_what_the_run_would(tmp_path, corpus, changes, ranks, message):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **changes))
    with pytest.raises((UserError, DataError), match=message):
        said(recipe, ranks)


def test_weights_of_another_shape_are_refused(tmp_path, corpus):
    options = {"train__steps": 2, "train__validate_every": 0}
    Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options))).train()
    model = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 64}
    model |= {"tie_embeddings": True, "attention": {"chunk_size": 16}}
    changes = {"init": {"from": str(tmp_path / "run")}, "run_dir": str(tmp_path / "other"), "model": model}
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options, **changes))
    with pytest.raises(UserError, match=r"init\.from: .* has shape"):
        said(recipe)
