"""Liger's kernels against plain torch on the CPU: results and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dash_train.model.config import ModelConfig
from dash_train.model.full_attention import full_attention
from dash_train.model.fused import RMSNorm, apply_rotary, swiglu
from dash_train.model.loss import LanguageModelHead
from dash_train.model.rotary import rotary_tables

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def compare(function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype) -> None:
    """Result and gradients of function(*inputs) on CUDA in dtype against those on the CPU in float32."""
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        # A copy, as a projection's result is: RoPE and SwiGLU overwrite what they are given.
        leaves = [x.to(dtype).to(device, kind).detach().requires_grad_() for x in inputs]
        out = function(*(leaf.clone() for leaf in leaves))
        weight = torch.linspace(-1, 1, out.shape[-1], device=device)
        gradients = torch.autograd.grad((out.float() * weight).sum(), leaves)
        results.append([x.detach().float().cpu() for x in (out, *gradients)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert (on_cuda - on_cpu).norm() <= TOLERANCE[dtype] * on_cpu.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 300, 2048), (1, 40000, 4, 128), (3, 7, 2, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        module = RMSNorm(shape[-1], eps=1e-5, device=x.device, dtype=x.dtype)
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    compare(norm, torch.randn(shape), torch.rand(shape[-1]) + 0.5, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 300, 5632), (1, 7, 48)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, torch.randn(shape), torch.randn(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 2, 128), (12, 3, 64), (4, 2, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_rotary(heads: int, kv_heads: int, head_dim: int, packed: bool, dtype: torch.dtype) -> None:
    config = ModelConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    positions = torch.arange(300)[None]
    if packed:
        positions = positions - torch.stack([positions[0] // 64 * 64, positions[0] // 128 * 128])

    def rotate(q: Tensor, k: Tensor) -> Tensor:
        tables = rotary_tables(positions.to(q.device), config)
        return torch.cat([x.flatten(2) for x in apply_rotary(q, k, *tables)], dim=-1)

    compare(rotate, torch.randn(2, 300, heads, head_dim), torch.randn(2, 300, kv_heads, head_dim), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab", [32768, 1000, 50304])
def test_cross_entropy(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_train.model.loss.CHUNK_LOGITS", 130 * vocab)
    hidden, weight = torch.randn(300, 256), torch.randn(vocab, 256) / 16
    labels = torch.randint(vocab, (300,))
    labels[::5] = -100
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        head = LanguageModelHead(256, vocab, std=1.0).to(device, kind)
        head.weight.data.copy_(weight.to(dtype))
        x = hidden.to(dtype).to(device, kind).requires_grad_()
        total, losses = head(x, labels.to(device))
        gradients = torch.autograd.grad(total / 7, (x, head.weight))
        with torch.no_grad():
            assert torch.equal(head(x, labels.to(device))[1], losses)
        results.append([t.detach().float().cpu() for t in (total, losses, *gradients)])
    assert not results[1][1][::5].any()
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert (on_cuda - on_cpu).norm() <= TOLERANCE[dtype] * on_cpu.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 8])
def test_full_attention_of_one_document_is_one_fused_call(group: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 512, 8, 128), torch.randn(2, 512, 8 // group, 128), torch.randn(2, 512, 8 // group, 128)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return full_attention(q, k, v, None).flatten(2)

    compare(attend, q, k, v, dtype=dtype)
    inputs = [x.to("cuda", dtype) for x in (q, k, v)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*inputs)
    expected = "efficient" if dtype == torch.float32 else "cudnn"
    assert f"aten::_scaled_dot_product_{expected}_attention" in {event.key for event in profile.key_averages()}
