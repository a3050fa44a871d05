from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dash_train.model.config import ModelConfig
from dash_train.model.loss import CHUNK_TOKENS, LanguageModelHead
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


def test_cross_entropy_in_chunks_equals_plain() -> None:
    head = LanguageModelHead(8, 50, std=1.0)
    hidden = torch.randn(2, CHUNK_TOKENS - 100, 8, requires_grad=True)
    labels = torch.randint(50, hidden.shape[:-1])
    labels[:, ::3] = -100

    total, losses = head(hidden, labels)
    gradients = torch.autograd.grad(total * 0.5, (hidden, head.weight))
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none")
    expected = torch.autograd.grad(plain.sum() * 0.5, (hidden, head.weight))

    torch.testing.assert_close(losses.flatten(), plain)
    torch.testing.assert_close(total, plain.sum())
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    tokens = torch.arange(48)[None]
    model(tokens, labels=tokens.roll(-1))["loss"].backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_activation_checkpointing_changes_no_gradient(attention: str, tiny_model: Build) -> None:
    plain, checkpointed = (gradients(tiny_model(attention, kind)) for kind in ("none", "full"))
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_mlp_in_pieces_changes_no_gradient(
    activation_checkpointing: str, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(tiny_model())
    monkeypatch.setattr("dash_train.model.transformer.MLP_TOKENS", 20)
    torch.testing.assert_close(gradients(tiny_model("full", activation_checkpointing)), plain, rtol=1e-4, atol=1e-5)


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
