import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_train.model.config import RopeScaling
from dash_train.model.rotary import rotary_frequencies

SCALINGS = [
    (RopeScaling(type="linear", factor=4, original_seq=64), {}),
    (RopeScaling(type="yarn", factor=8, original_seq=64), {"beta_fast": 32.0, "beta_slow": 1.0}),
    (RopeScaling(type="yarn", factor=4, original_seq=4096), {"beta_fast": 32.0, "beta_slow": 1.0}),
    (
        RopeScaling(type="llama3", factor=8, original_seq=8192),
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
]


@pytest.mark.parametrize(("scaling", "extra"), SCALINGS)
def test_frequencies_equal_transformers(scaling: RopeScaling, extra: dict) -> None:
    parameters = {"rope_type": scaling.type, "rope_theta": 10000.0, "factor": scaling.factor, **extra}
    parameters["original_max_position_embeddings"] = scaling.original_seq
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=parameters)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.type](config, "cpu")

    ours, our_factor = rotary_frequencies(64, 10000.0, scaling)
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)
    assert our_factor == pytest.approx(factor)
