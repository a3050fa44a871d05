from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]

HUGGINGFACE_SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "vocab_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_full_attention_is_llama(tied: bool, qk_norm: bool, tiny_model: Build) -> None:
    model = tiny_model(tie_embeddings=tied, qk_norm=qk_norm)
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    theirs = model_class(config_class(**HUGGINGFACE_SHAPE, tie_word_embeddings=tied))
    theirs.load_state_dict(model.state_dict())

    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)["logits"], theirs(tokens).logits, atol=1e-4, rtol=0)


def test_meta_construction_then_initialize_equals_direct() -> None:
    config = ModelConfig(layers=2, vocab_size=64, init_std=0.2, attention={"type": ["dash", "full"]})
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu").initialize(torch.Generator().manual_seed(3))
    again = LanguageModel(config)
    again.initialize(torch.Generator().manual_seed(3))

    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    state = model.state_dict()
    assert abs(state["model.layers.0.mlp.up_proj.weight"].std() - 0.2) < 0.001
    assert abs(state["model.layers.0.mlp.down_proj.weight"].std() - 0.1) < 0.001
    assert state["model.layers.0.self_attn.chunk_query"].abs().max() == 0


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_rows_of_one_document_need_no_starts(attention: str, tiny_model: Build) -> None:
    model, tokens = tiny_model(attention), torch.randint(64, (2, 96))
    with torch.no_grad():
        named = model(tokens, document_starts=torch.zeros(2, 96, dtype=torch.int32))["logits"]
        torch.testing.assert_close(model(tokens)["logits"], named, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_packed_documents_are_isolated(attention: str, tiny_model: Build) -> None:
    """Document B sees nothing of A, and is what it would be alone."""
    model = tiny_model(attention)
    tokens = torch.randint(64, (1, 96))
    starts = torch.zeros(1, 96, dtype=torch.int32)
    starts[:, 32:] = 32
    changed = tokens.clone()
    changed[:, :32] = torch.randint(64, (1, 32))

    with torch.no_grad():
        packed, other, alone = (
            model(row, document_starts=start)["logits"][:, -64:]
            for row, start in [(tokens, starts), (changed, starts), (tokens[:, 32:], None)]
        )
    assert torch.equal(packed, other)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
