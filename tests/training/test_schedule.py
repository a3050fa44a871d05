import pytest

from dash_train.recipe.schema import ScheduleConfig
from dash_train.training.schedule import lr_factor


def curve(steps=100, **schedule):
    config = ScheduleConfig(**schedule)
    return [lr_factor(step, steps, config) for step in range(steps)]


def test_the_warmup_rises_linearly_to_the_peak():
    factors = curve(type="constant", warmup_steps=4)
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(factors[4:]) == {1.0}


def test_cosine_falls_from_the_peak_to_the_minimum():
    factors = curve(type="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.55)  # half way
    assert factors[-1] == pytest.approx(0.1)
    assert factors[9:] == sorted(factors[9:], reverse=True)


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_wsd_is_flat_then_falls(decay, half):
    factors = curve(type="wsd", decay=decay, warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    assert set(factors[10:80]) == {1.0}
    assert factors[89] == pytest.approx(half)
    assert factors[-1] == pytest.approx(0.0)


def test_wsd_decays_over_a_fifth_of_the_run_by_default():
    factors = curve(type="wsd", warmup_steps=0)
    assert factors[79] == 1.0 > factors[80]


def test_a_decay_longer_than_the_run_begins_after_the_warmup():
    factors = curve(steps=30, type="wsd", decay="linear", warmup_steps=10, decay_steps=100, min_lr_ratio=0.0)
    assert factors[9] == 1.0 > factors[10]
    assert factors[-1] == pytest.approx(0.0)
