from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_train.model import calibration
from dash_train.model.calibration import calibrate_routing_scale, set_routing_scales
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]
BLOCKS = {"routing_block": [1, 16], "routing_window": [5, 16]}


def rows(count: int) -> dict[str, Tensor]:
    """Rows of 256 tokens; the first holds two documents, the last has padding."""
    document_starts = torch.zeros(count, 256, dtype=torch.int32)
    document_starts[0, 64:] = 64
    real = torch.ones(count, 256, dtype=torch.bool)
    real[-1, 200:] = False
    return {"tokens": torch.randint(64, (count, 256)), "document_starts": document_starts, "real": real}


def uncalibrated(build: Build, routing: dict[str, Any], **options: Any) -> LanguageModel:
    return build("dash", routing={**routing, "routing_scale": "auto", "initial_density": 0.5}, **options)


@pytest.mark.parametrize("routing", [{}, BLOCKS], ids=["tokens", "blocks"])
def test_calibration_hits_the_target_density(routing: dict[str, Any], tiny_model: Build) -> None:
    """Over all rows together, whatever batches they come in and wherever they wait."""
    model, offloading = (
        uncalibrated(tiny_model, routing, activation_checkpointing="full", activation_offload=offload)
        for offload in (False, True)
    )
    batch = rows(6)
    scales = calibrate_routing_scale(model, [batch])
    statistics = model(**batch, labels=batch["tokens"])
    density = statistics["active_chunks"] / statistics["eligible_chunks"]
    assert density.tolist() == pytest.approx([0.5, 0.5], abs=5e-3)
    assert model.config.attention.routing_scale == scales

    parts = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(2), slice(2, 6))]
    assert calibrate_routing_scale(offloading, parts) == pytest.approx(scales, rel=1e-3)
    assert offloading.model.host_memory and len(offloading.model.host_memory.free) == 2

    again = tiny_model("dash", routing=routing)
    set_routing_scales(again, model.config)
    with torch.no_grad():
        assert torch.equal(again(batch["tokens"])["logits"], model(batch["tokens"])["logits"])


def test_full_layers_have_no_scale(tiny_model: Build) -> None:
    model = uncalibrated(tiny_model, {"type": ["full", "dash"]})
    scales = calibrate_routing_scale(model, [{"tokens": torch.randint(64, (2, 256))}])
    assert scales[0] == 1.0 != scales[1]


@pytest.mark.parametrize("routing", [{}, BLOCKS], ids=["tokens", "blocks"])
def test_a_sample_gives_nearly_the_same(
    routing: dict[str, Any], tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows(6)
    whole = calibrate_routing_scale(uncalibrated(tiny_model, routing), [batch])
    monkeypatch.setattr(calibration, "SAMPLE", 6 * 64)
    sampled = calibrate_routing_scale(uncalibrated(tiny_model, routing), [batch])
    assert sampled[0] != whole[0] and sampled == pytest.approx(whole, rel=0.1)
