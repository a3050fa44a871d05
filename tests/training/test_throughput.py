import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel
from dash_train.training.throughput import attended_flops_per_token, dense_flops_per_token

SEQ = 256


SHAPE = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp_size": 128, "vocab_size": 512}


def config(**changes):
    return ModelConfig(**SHAPE, **changes, attention={"type": "full"})


@pytest.mark.parametrize("tied", [False, True])
def test_dense_flops_are_what_torch_counts(tied):
    shape = config(tie_embeddings=tied)
    model = LanguageModel(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(0, 512, (1, SEQ))
    # SDPA by matrix products, so that the counter sees them: the whole square, as the convention has it.
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, labels=tokens)["loss"].backward()
    assert counter.get_total_flops() / SEQ == pytest.approx(dense_flops_per_token(shape, parameters, SEQ), rel=0.02)


def test_attended_flops_fall_with_the_routed_chunks():
    shape = config()
    parameters = sum(parameter.numel() for parameter in LanguageModel(shape).parameters())
    width, chunk_size = 4 * 32, 64
    weights = dense_flops_per_token(shape, parameters, 0)
    full = attended_flops_per_token(shape, parameters, 8192, [None, None])
    assert full == weights + 2 * 12 * width * 4096, "causal: half of the row"
    sparse = attended_flops_per_token(shape, parameters, 8192, [3.0, None])
    routing = 6 * width * (8192 / chunk_size / 2)
    assert sparse == weights + 12 * width * 4096 + 12 * width * chunk_size * 3.5 + routing
