"""target_density: the routing scales follow what steps measure."""

import itertools
import math
import random

import pytest
import torch
from pydantic import ValidationError

from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel
from dash_train.training.density import steer

SHAPE = {
    "layers": 3,
    "hidden_size": 32,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "mlp_size": 32,
    "vocab_size": 64,
}


def tiny(**attention: object) -> tuple[LanguageModel, ModelConfig]:
    kinds = {"type": ["dash", "full", "dash"], "routing_scale": [8.0, 1.0, 30.0], **attention}
    model = LanguageModel(ModelConfig(**SHAPE, attention=kinds))
    return model, model.config


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
def test_density_holds_its_target_and_follows_a_schedule(power: float) -> None:
    """A router whose density falls as a power of the scale, and differs by a third from batch to batch."""
    model, config = tiny(target_density=[[0, 0.25], [300, 0.1]])
    noise = random.Random(0)
    seen: list[list[float | None]] = []
    for step in range(600):
        true = [min(1.0, (c / config.routing_scale(layer)) ** power) for layer, c in ((0, 1.0), (2, 15.0))]
        seen.append(true)
        measured = [d * math.exp(noise.gauss(-0.055, 0.33)) for d in true]
        steer(model, config, step, [measured[0], None, measured[1]])
    for first, last, target in ((100, 300, 0.25), (420, 600, 0.1)):
        for layer in range(2):
            mean = sum(densities[layer] for densities in seen[first:last]) / (last - first)
            assert mean == pytest.approx(target, rel=0.1)
    jumps = [abs(math.log(b[0] / a[0])) for a, b in itertools.pairwise(seen)]
    assert max(jumps) < 0.12  # nothing jumps where the target does
    assert config.routing_scale(1) == 1.0
    assert [block.self_attn.routing_scale for block in model.model.layers] == config.attention.routing_scale


def test_it_is_off_by_default_and_before_its_first_step() -> None:
    for target in (None, [[5, 0.1]]):
        model, config = tiny(target_density=target)
        steer(model, config, 4, [0.5, None, 0.5])
        assert config.attention.routing_scale == [8.0, 1.0, 30.0]


def test_a_change_is_bounded() -> None:
    model, config = tiny(target_density=0.01)
    steer(model, config, 0, [1.0, None, 0.0])
    assert config.routing_scale(0) == pytest.approx(8 * math.exp(0.05))
    assert config.routing_scale(2) == 30.0


@pytest.mark.parametrize("wrong", [[], [[5, 0.1], [2, 0.2]], [[0, 1.5]], 0.0])
def test_targets_that_make_no_sense_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError, match="target_density"):
        tiny(target_density=wrong)


def test_a_new_scale_reaches_the_router() -> None:
    model, config = tiny(target_density=0.01, chunk_size=16, type="dash", routing_scale=1.0)
    tokens = torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(0))

    def density() -> float:
        out = model(tokens, labels=tokens)
        return (out["active_chunks"].sum() / out["eligible_chunks"].sum()).item()

    before = density()
    for step in range(200):
        steer(model, config, step, [before] * 3)
    assert density() < before / 2
