import pytest
import torch
from dash_cases import Case, call, relative_error

from dash_train.kernels.dash import dash_attention, router_gradient
from dash_train.kernels.dash.reference import dash_attention_reference
from dash_train.kernels.dash.stages import DashConfig


def problem(dtype=torch.float64):
    """ "none" is the normalizer whose gradient is the derivative of the forward pass."""
    torch.manual_seed(0)
    tensors, options = call(Case(group=4, normalizer="none", documents=True), 6, "cpu")
    tensors = [t.to(dtype) for t in tensors]
    return tensors, options, torch.randn_like(tensors[0])


def test_it_is_the_derivative_by_what_the_router_sees():
    tensors, options, dout = problem()
    dq, dw = router_gradient(dout, *tensors, **options)
    starts = options.pop("document_starts")
    fixed = {"config": DashConfig(**options), "document_starts": starts, "query_starts": (0,), "support": None}
    step = 1e-6 * torch.randn_like(tensors[0])
    after, before = (
        (dash_attention_reference(*tensors, **fixed, router_q=tensors[0] + move)[0] * dout).sum()
        for move in (step, -step)
    )
    assert ((after - before) / 2).item() == pytest.approx((dq * step).sum().item(), rel=1e-4)
    inputs = [t.requires_grad_() for t in tensors]
    out = dash_attention(*inputs, **options, document_starts=starts)
    torch.testing.assert_close(dw, torch.autograd.grad(out, inputs[3], dout)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_finds_the_same(dtype):
    tensors, options, dout = problem(dtype)
    ours = router_gradient(dout, *tensors, **options, backend="triton")
    truth = router_gradient(dout.double(), *[t.double() for t in tensors], **options)
    assert ours[0].dtype == torch.float32
    for one, expected in zip(ours, truth, strict=True):
        assert relative_error(one, expected) < (2e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.gpu
def test_on_cuda():
    torch.manual_seed(0)
    tensors, options = call(Case(dtype=torch.bfloat16, head_dim=64, group=4, chunk_size=64), 20, "cuda")
    dout = torch.randn_like(tensors[0])
    ours = router_gradient(dout, *tensors, **options)
    truth = router_gradient(dout.double(), *[t.double() for t in tensors], **options)
    for one, expected in zip(ours, truth, strict=True):
        assert relative_error(one, expected) < 3e-2


@pytest.mark.gpu
def test_reference_on_cuda():
    """In fp32, where attention is SDPA, as in float64."""
    tensors, options = call(Case(dtype=torch.float32, head_dim=64, group=4, chunk_size=64), 20, "cuda")
    dout = torch.randn_like(tensors[0])
    ours = router_gradient(dout, *tensors, **options, backend="reference")
    truth = router_gradient(dout.double(), *[t.double() for t in tensors], **options, backend="reference")
    for one, expected in zip(ours, truth, strict=True):
        assert relative_error(one, expected) < 1e-3
