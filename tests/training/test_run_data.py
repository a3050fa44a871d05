"""A run keeps its own text and tokenizer, whatever becomes of the sources, the cache and the working directory."""

import logging
import os
import shutil

import pytest
from tiny_runs import write_recipe

from dash_train.data.shards import read_meta
from dash_train.data.tokenizer import load_tokenizer
from dash_train.errors import UserError
from dash_train.evaluation.subject import read_documents
from dash_train.inference.trained import load_trained
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint, run_data
from dash_train.training.run_data import data_of
from dash_train.training.trainer import Trainer


@pytest.fixture
def text(tmp_path, corpus):
    """A copy of the corpus that a test may change."""
    return shutil.copytree(corpus, tmp_path / "text")


def recipe(folder, text, **changes):
    options = {"train__steps": 2, "train__validate_every": 0, "schedule__type": "constant"}
    options["data__cache"] = str(folder / "cache")
    return load_recipe(write_recipe(folder / "recipe.yaml", text, **{**options, **changes}))


def change(text):
    (text / "json" / "__init__.py").write_text("entirely other words, zebra quux\n" * 500)


def forget(folder):
    shutil.rmtree(folder / "cache")


def documents(folder, cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    return read_documents(load_trained(folder / "run"), None)


def test_a_run_goes_on_with_its_text_though_the_sources_have_changed(tmp_path, text, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    Trainer(recipe(whole, text, train__steps=4)).train()
    Trainer(recipe(tmp_path, text)).train()
    change(text)
    monkeypatch.setattr(run_data, "prepare", None)
    Trainer(recipe(tmp_path, text, train__steps=4)).train()
    losses = [[line["loss"] for line in read_metrics(folder / "run")[0]] for folder in (whole, tmp_path)]
    assert losses[0] == losses[1]


def test_what_reads_a_run_reads_its_text_from_anywhere(tmp_path, text, monkeypatch):
    Trainer(recipe(tmp_path, text)).train()
    before = documents(tmp_path, tmp_path, monkeypatch)
    change(text)
    (tmp_path / "elsewhere").mkdir()
    assert documents(tmp_path, tmp_path / "elsewhere", monkeypatch) == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_text_that_is_gone_is_made_again_by_the_runs_own_tokenizer(tmp_path, text, monkeypatch, caplog):
    Trainer(recipe(tmp_path, text)).train()
    before = documents(tmp_path, tmp_path, monkeypatch)
    forget(tmp_path)
    assert documents(tmp_path, tmp_path, monkeypatch) == before
    assert "tokenized again by the run's tokenizer" in caplog.text
    forget(tmp_path)
    change(text)
    folder = data_of(checkpoint.find(tmp_path / "run"))
    assert read_meta(folder / "validation").tokenizer_hash == load_tokenizer(tmp_path / "run" / "tokenizer").hash


def test_a_run_whose_text_is_gone_goes_on_where_it_can_be_made_again(tmp_path, text):
    Trainer(recipe(tmp_path, text)).train()
    forget(tmp_path)
    trainer = Trainer(recipe(tmp_path, text, train__steps=4))
    assert trainer.step == 2
    trainer.train()
    forget(tmp_path)
    change(text)
    with pytest.raises(UserError, match=r"the data differs: shards is .*; the sources hold something else than before"):
        Trainer(recipe(tmp_path, text, train__steps=6))


def test_a_branch_on_the_same_text_tokenizes_nothing(tmp_path, text, monkeypatch):
    Trainer(recipe(tmp_path, text)).train()
    monkeypatch.setattr(run_data, "prepare", None)
    init = {"from": str(tmp_path / "run"), "keep": ["data"]}
    trainer = Trainer(recipe(tmp_path, text, init=init, run_dir=str(tmp_path / "branch")))
    assert trainer.progress.rows == 16


def test_paths_are_resolved_when_a_recipe_is_loaded(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [{"type": "text", "path": os.path.relpath(corpus)}, {"type": "huggingface", "path": "roneneldan/Tales"}]
    path = write_recipe(
        tmp_path / "recipe.yaml", corpus, run_dir="runs/one", data__sources=sources, data__cache="cache"
    )
    loaded = load_recipe(path, ["init.from=runs/base", "data.tokenizer.path=tokenizer"])
    assert loaded.run_dir == str(tmp_path / "runs" / "one")
    assert loaded.init.from_ == str(tmp_path / "runs" / "base")
    assert loaded.data.cache == str(tmp_path / "cache")
    assert loaded.data.tokenizer.path == str(tmp_path / "tokenizer")
    assert [source.path for source in loaded.data.sources] == [str(corpus), "roneneldan/Tales"]


def test_a_run_is_resumed_from_another_working_directory(tmp_path, text, monkeypatch, caplog):
    """By the recipe in its folder."""
    monkeypatch.chdir(tmp_path)
    path = write_recipe(
        tmp_path / "recipe.yaml", text, run_dir="run", data__sources=[{"type": "text", "path": "text"}],
        data__cache="cache", train__steps=2, train__validate_every=0,
    )  # fmt: skip
    Trainer(load_recipe(path)).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with caplog.at_level(logging.INFO):
        Trainer(load_recipe(tmp_path / "run" / "recipe.yaml", ["train.steps=3"])).train()
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}" in caplog.text
    assert list((tmp_path / "elsewhere").iterdir()) == []
