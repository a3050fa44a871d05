"""What saves memory changes no gradient: the loss and the MLP in pieces, checkpoint policies, offload."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dash_train.model.loss import LanguageModelHead
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]
POLICIES = ["none", "full", "selective"]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 48 tokens go through the MLP in three pieces and through a vocabulary of 64 in five."""
    monkeypatch.setattr("dash_train.model.transformer.MLP_TOKENS", 20)
    monkeypatch.setattr("dash_train.model.loss.CHUNK_LOGITS", 11 * 64)


def gradients(model: LanguageModel, rows: int = 1) -> list[torch.Tensor]:
    """Of two backward passes, as in an accumulation of two."""
    for shift in (1, 2):
        tokens = torch.arange(48).repeat(rows, 1) + torch.arange(rows)[:, None]
        starts = torch.zeros_like(tokens, dtype=torch.int32)
        starts[:, 32:] = 32
        model(tokens, labels=tokens.roll(-shift), document_starts=starts)["loss"].backward()
    return [parameter.grad for parameter in model.parameters()]


def test_cross_entropy_in_chunks_equals_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_train.model.loss.CHUNK_LOGITS", 30 * 50)
    head = LanguageModelHead(8, 50, std=1.0)
    hidden = torch.randn(2, 47, 8, requires_grad=True)
    labels = torch.randint(50, hidden.shape[:-1])
    labels[:, ::3] = -100

    total, losses = head(hidden, labels)
    gradients = torch.autograd.grad(total * 0.5, (hidden, head.weight))
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none")
    expected = torch.autograd.grad(plain.sum() * 0.5, (hidden, head.weight))

    torch.testing.assert_close(losses.flatten(), plain)
    torch.testing.assert_close(total, plain.sum())
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(head(hidden, labels)[1], losses)


@pytest.mark.parametrize("attention", ["full", "dash"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_saving_changes_a_gradient(attention: str, policy: str, offload: bool, tiny_model: Build) -> None:
    options = {"layers": 3, "routing": {"routing_block": [1, 4, 16], "routing_window": [1, 9, 2]}}
    plain = gradients(tiny_model(attention, **options))
    saving = gradients(tiny_model(attention, policy, activation_offload=offload, **options))
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_pieces_change_no_gradient(policy: str, rows: int, tiny_model: Build, request: pytest.FixtureRequest) -> None:
    plain = gradients(tiny_model("dash"), rows)
    request.getfixturevalue("small_pieces")
    pieces = gradients(tiny_model("dash", policy, activation_offload=policy == "full"), rows)
    torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_does_not_compute_attention_again(policy: str, runs: int, tiny_model: Build) -> None:
    model, tokens = tiny_model("full", policy), torch.arange(48)[None]
    with Calls() as calls:
        model(tokens, labels=tokens.roll(-1))["loss"].backward()
    assert calls.count["aten._scaled_dot_product_flash_attention_for_cpu.default"] == 2 * runs


def test_offload_keeps_one_buffer_a_block(tiny_model: Build) -> None:
    """All blocks but the last have theirs in host memory, the same ones in every step."""
    model = tiny_model("dash", "full", activation_offload=True, layers=4)
    memory, tokens = model.model.host_memory, torch.arange(48)[None]
    seen = set()
    for _ in range(3):
        loss = model(tokens, labels=tokens)["loss"]
        assert not memory.free
        loss.backward()
        gc.collect()
        seen |= {buffer.data_ptr() for buffer in memory.free}
        assert len(memory.free) == 3
    assert len(seen) == 3


def test_the_backward_pass_reads_the_buffers(tiny_model: Build) -> None:
    model, tokens = tiny_model("dash", "full", activation_offload=True), torch.arange(48)[None]
    model(tokens, labels=tokens)["loss"].backward()
    whole = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    (buffer,) = model.model.host_memory.free
    loss = model(tokens, labels=tokens)["loss"]
    buffer.zero_()
    loss.backward()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, whole), "from an input of zero comes no gradient"
