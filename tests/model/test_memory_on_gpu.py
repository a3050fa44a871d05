"""Checkpoint policies and offload on CUDA: the same gradients to the bit, and less memory."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dash_train.model.transformer import LanguageModel

pytestmark = pytest.mark.gpu

SHAPE = {"layers": 4, "hidden_size": 256, "heads": 8, "kv_heads": 2, "head_dim": 64, "mlp_size": 512}
BLOCKS = {"routing_block": [1, 4, 16, 16], "routing_window": [4, 9, 1, 16]}


def gradients(model: LanguageModel, packed: bool = False, seq: int = 4096) -> list[torch.Tensor]:
    """Of two backward passes, as in an accumulation of two, in bf16."""
    for seed in (1, 2):
        tokens = torch.randint(64, (1, seq), generator=torch.Generator().manual_seed(seed)).cuda()
        starts = torch.zeros_like(tokens, dtype=torch.int32)
        if packed:
            starts[:, seq // 2 :] = seq // 2
        model(tokens, labels=tokens.roll(-1), document_starts=starts)["loss"].backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def build(tiny_model: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
    return lambda *args, **options: tiny_model(*args, **{**SHAPE, **options}).to("cuda", torch.bfloat16)


@pytest.mark.parametrize(("attention", "routing"), [("dash", {}), ("dash", BLOCKS), ("full", {})])
@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("offload", [False, True])
def test_no_saving_changes_a_gradient(
    attention: str, routing: dict[str, Any], policy: str, offload: bool, build: Any
) -> None:
    """Bit for bit for Dash; cuDNN's backward pass adds in no fixed order."""
    plain = gradients(build(attention, routing=routing))
    saving = gradients(build(attention, policy, activation_offload=offload, routing=routing))
    for one, other in zip(plain, saving, strict=True):
        if attention == "dash":
            assert torch.equal(one, other)
        else:
            assert (one - other).norm() <= 2e-2 * one.norm()


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_packed_rows_of_full_attention(policy: str, build: Any) -> None:
    plain = gradients(build("full"), packed=True)
    for one, other in zip(plain, gradients(build("full", policy), packed=True), strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()


def test_mlp_in_pieces(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(build("dash", "full"))
    monkeypatch.setattr("dash_train.model.transformer.MLP_TOKENS", 1000)
    for one, other in zip(plain, gradients(build("dash", "full", activation_offload=True)), strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("full", 2), ("selective", 1)])
@pytest.mark.parametrize(
    ("attention", "operator"),
    [("dash", "dash_train.dash_attention.default"), ("full", "aten._scaled_dot_product_cudnn_attention.default")],
)
def test_selective_does_not_compute_attention_again(
    policy: str, runs: int, attention: str, operator: str, build: Any
) -> None:
    model, tokens = build(attention, policy), torch.randint(64, (1, 1024)).cuda()
    with Calls() as calls:
        model(tokens, labels=tokens)["loss"].backward()
    assert calls.count[operator] == SHAPE["layers"] * runs


def test_offloaded_inputs_leave_the_device(build: Any) -> None:
    """The forward pass of 8 blocks keeps one input instead of eight, and reuses its pinned buffers."""
    tokens = torch.randint(64, (1, 2**15)).cuda()
    one_input = tokens.numel() * SHAPE["hidden_size"] * 2
    kept = {}
    for offload in (False, True):
        model = build("dash", "full", activation_offload=offload, layers=8)
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            loss = model(tokens, labels=tokens)["loss"]
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # the allocator looks for blocks that the copies are done with
            kept[offload] = torch.cuda.memory_allocated() - before
            loss.backward()
            model.zero_grad(set_to_none=True)
            del loss
    memory = model.model.host_memory
    assert len(memory.free) == 7 and all(buffer.is_pinned() for buffer in memory.free)
    assert kept[False] - kept[True] > 5 * one_input
