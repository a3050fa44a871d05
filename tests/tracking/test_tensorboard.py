import json
import sys
from types import ModuleType

import pytest
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking import tracker
from dash_train.training.trainer import Trainer


class Board:
    """What torch.utils.tensorboard writes with."""

    written = {}  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.written.clear()
        self.written["folder"] = folder

    def add_scalar(self, key, value, step):
        self.written[key, step] = value

    def add_image(self, key, image, step, dataformats):
        self.written["figure", key, step] = (image.ndim, dataformats)

    def close(self):
        self.written["closed"] = True


@pytest.fixture
def recipe(tmp_path, corpus):
    options = {"train__steps": 2, "train__validate_every": 2, "tracking__tensorboard": True}
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options))


def test_the_numbers_of_a_run_and_its_figure_are_written(recipe, tmp_path, monkeypatch):
    module = ModuleType("tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(tracker, "find_spec", lambda name: name)
    Trainer(recipe).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = next(line for line in lines if line["step"] == 2 and "loss" in line)
    assert Board.written["loss", 2] == training["loss"]
    assert Board.written["density/1", 2] == training["density"][1]
    assert ("validation_loss", 2) in Board.written
    assert Board.written["loss", 2] != Board.written["loss", 1]
    assert Board.written["figure", "loss", 2] == (3, "HWC")
    assert Board.written["closed"]


def test_without_the_package_it_is_refused_by_name(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.tensorboard: true needs the package tensorboard"):
        Trainer(recipe)
    assert not (tmp_path / "run").exists()
