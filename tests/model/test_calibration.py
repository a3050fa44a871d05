from collections.abc import Callable

import pytest
import torch

from dash_train.model.calibration import calibrate_routing_scale, set_routing_scales
from dash_train.model.transformer import LanguageModel


def test_calibration_hits_the_target_density(tiny_model: Callable[..., LanguageModel]) -> None:
    model = tiny_model("dash")
    model.config.attention.routing_scale = "auto"
    model.config.attention.initial_density = 0.5
    tokens = torch.randint(64, (2, 256))
    document_starts = torch.zeros(2, 256, dtype=torch.int32)
    document_starts[0, 64:] = 64
    real = torch.ones(2, 256, dtype=torch.bool)
    real[1, 200:] = False

    scales = calibrate_routing_scale(model, tokens, document_starts, real)
    statistics = model(tokens, labels=tokens, document_starts=document_starts, real=real)

    density = statistics["active_chunks"] / statistics["eligible_chunks"]
    assert density.tolist() == pytest.approx([0.5, 0.5], abs=2e-3)
    assert model.config.attention.routing_scale == scales

    again = tiny_model("dash")
    set_routing_scales(again, model.config)
    with torch.no_grad():
        assert torch.equal(again(tokens)["logits"], model(tokens)["logits"])
