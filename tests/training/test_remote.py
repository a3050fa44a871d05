"""Copies of checkpoints elsewhere, and runs that begin with them."""

import logging
import shutil

import fsspec
import pytest
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer

OPTIONS = {"train__validate_every": 0, "checkpoint__keep_last": 1, "schedule__type": "constant"}


def recipe(folder, corpus, address, **changes):
    options = {**OPTIONS, "checkpoint__copy_to": address, **changes}
    return load_recipe(write_recipe(folder / "recipe.yaml", corpus, **options))


@pytest.fixture(params=["disk", "memory"])
def address(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "copies")
    return f"memory://{tmp_path.name}/copies"


def test_every_checkpoint_is_copied_and_a_new_folder_goes_on_from_there(tmp_path, corpus, address, caplog):
    Trainer(recipe(tmp_path / "whole", corpus, None)).train()
    Trainer(recipe(tmp_path, corpus, address, train__steps=4)).train()
    files, root = fsspec.core.url_to_fs(address)
    names = [path.rpartition("/")[2] for path in files.ls(f"{root}/checkpoints", detail=False)]
    assert sorted(names) == ["step-00000002", "step-00000004"], "nothing is removed there"
    files.rm(f"{root}/checkpoints/step-00000004/manifest.json")
    shutil.rmtree(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        Trainer(recipe(tmp_path, corpus, address)).train()
    assert "step-00000002: brought from" in caplog.text, "one that is not complete does not count"
    whole, parts = (
        {line["step"]: line["loss"] for line in read_metrics(folder / "run")[0]}
        for folder in (tmp_path / "whole", tmp_path)
    )
    assert parts == {step: loss for step, loss in whole.items() if step > 2}
    assert checkpoint.find(tmp_path / "run").name == "step-00000006"


def test_a_copy_that_fails_is_warned_of(tmp_path, corpus, caplog):
    (tmp_path / "file").write_text("in the way")
    Trainer(recipe(tmp_path, corpus, str(tmp_path / "file" / "copies"), train__steps=2)).train()
    assert "step-00000002: not copied to" in caplog.text
    assert checkpoint.find(tmp_path / "run").name == "step-00000002"


def test_an_address_of_no_kind_is_refused(tmp_path, corpus):
    with pytest.raises(UserError, match=r"checkpoint\.copy_to: xyz://bucket: Protocol not known"):
        Trainer(recipe(tmp_path, corpus, "xyz://bucket"))
    assert not (tmp_path / "run").exists()
