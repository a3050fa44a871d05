import logging
import random

import pytest
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.spikes import FEWEST, SpikeWatch
from dash_train.training.trainer import Trainer

OPTIONS = {"train__validate_every": 0, "checkpoint__every": 2, "train__steps": 8, "schedule__type": "constant"}


def test_a_loss_far_above_those_before_is_a_spike():
    noise = random.Random(0)
    watch = SpikeWatch(threshold=8.0)
    assert not any(watch.is_spike(3.0 - step / 500 + noise.gauss(0, 0.05)) for step in range(300))
    assert watch.is_spike(4.5)
    assert watch.is_spike(4.5), "a spike is not what others are measured by"
    assert not watch.is_spike(float("nan"))
    assert not watch.is_spike(2.45)


def test_nothing_is_a_spike_at_the_beginning_or_in_a_flat_run():
    watch = SpikeWatch(threshold=8.0)
    assert not any(watch.is_spike(10.0 - step) for step in range(FEWEST))
    flat = SpikeWatch(threshold=8.0)
    assert not any(flat.is_spike(1.0) for _ in range(100))
    assert not flat.is_spike(1.0001)


@pytest.fixture
def spiking(monkeypatch):
    """Makes the losses of these steps, counted by calls, spikes."""

    def make(*calls):
        seen = []

        def is_spike(self, loss):
            seen.append(loss)
            return len(seen) in calls

        monkeypatch.setattr(SpikeWatch, "is_spike", is_spike)

    return make


def recipe(folder, corpus, **changes):
    return load_recipe(write_recipe(folder / "recipe.yaml", corpus, **{**OPTIONS, **changes}))


def hashes(folder):
    return [line["rows_hash"] for line in read_metrics(folder / "run")[0]]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rollback_leaves_the_rows_out(tmp_path, corpus, spiking, caplog, stage):
    Trainer(recipe(tmp_path / "whole", corpus, train__steps=10)).train()
    changes = {"train__on_spike": "rollback", "parallel__zero_stage": stage, "optimizer__ema": 0.9}
    spiking(5)
    with caplog.at_level(logging.WARNING):
        Trainer(recipe(tmp_path, corpus, **changes)).train()
    assert "step 5: the loss, " in caplog.text and "is a spike (train.on_spike: rollback)" in caplog.text
    assert "rolled back from step 5 to step 4; rows 32 to 40 are left out" in caplog.text
    whole = hashes(tmp_path / "whole")
    assert hashes(tmp_path) == [*whole[:4], *whole[5:9]]
    state = checkpoint.load_state(checkpoint.find(tmp_path / "run"))
    assert (state.step, state.rows, state.optimizer_steps, state.skipped_steps) == (8, 72, 8, 0)
    skipped = {"train__skip_steps": [[5, 5]], "train__steps": 9, "parallel__zero_stage": stage}
    Trainer(recipe(tmp_path / "skipped", corpus, **skipped)).train()
    losses, expected = (
        [line["loss"] for line in read_metrics(folder / "run")[0]] for folder in (tmp_path, tmp_path / "skipped")
    )
    assert losses == expected, "as if the recipe had passed over the step"


def test_a_warning_changes_nothing(tmp_path, corpus, spiking, caplog):
    Trainer(recipe(tmp_path / "whole", corpus)).train()
    spiking(5)
    Trainer(recipe(tmp_path, corpus)).train()
    assert "step 5: the loss, " in caplog.text
    assert hashes(tmp_path) == hashes(tmp_path / "whole")


def test_a_loss_that_leaves_its_course_again_and_again_ends_the_run(tmp_path, corpus, spiking):
    spiking(5, 6, 7, 8)
    with pytest.raises(UserError, match="step 5: rolled back to step 4 3 times"):
        Trainer(recipe(tmp_path, corpus, train__on_spike="rollback")).train()
    assert checkpoint.find(tmp_path / "run").name == "step-00000004"


def test_a_streak_of_skipped_steps_is_rolled_back(tmp_path, corpus, monkeypatch, caplog):
    changes = {"train__on_spike": "rollback", "train__max_nonfinite_steps": 2}
    trainer = Trainer(recipe(tmp_path, corpus, **changes))
    healthy, calls = trainer.engine.backward, []

    def diverging(loss, **options):
        calls.append(1)
        bad = len(calls) > 16 and len(calls) <= 24  # the micro-batches of the fifth and sixth step
        healthy(loss * (float("nan") if bad else 1), **options)

    monkeypatch.setattr(trainer.engine, "backward", diverging)
    trainer.train()
    assert "rolled back from step 6 to step 4; rows 32 to 48 are left out" in caplog.text
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run")).skipped_steps == 0
