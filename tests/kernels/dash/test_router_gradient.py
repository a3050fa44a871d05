import pytest
import torch
from dash_cases import Case, call, relative_error

from dash_train.kernels.dash import dash_attention, router_gradient, router_queries


def problem(dtype=torch.float64):
    """ "none" is the normalizer whose gradient is the derivative of the forward pass."""
    torch.manual_seed(0)
    tensors, options = call(Case(group=4, normalizer="none", documents=True), 6, "cpu")
    tensors = [t.to(dtype) for t in tensors]
    return tensors, options, torch.randn_like(tensors[0])


def with_blocks(options, block, window):
    """The arguments of router_gradient for such blocks."""

    def make_router_q(q):
        return router_queries(q, options["document_starts"], block=block, window=window)

    return make_router_q, {**options, "routing_block": block}


@pytest.mark.parametrize(("block", "window"), [(1, 1), (1, 5), (4, 1), (4, 9)])
def test_it_is_the_derivative_by_what_the_router_sees(block, window):
    tensors, options, dout = problem()
    make_router_q, options = with_blocks(options, block, window)

    def product(q):
        return (dash_attention(*tensors, **options, router_q=make_router_q(q)) * dout).sum()

    dq, dw = router_gradient(dout, *tensors, make_router_q=make_router_q, **options)
    step = 1e-6 * torch.randn_like(tensors[0])
    after, before = product(tensors[0] + step), product(tensors[0] - step)
    assert ((after - before) / 2).item() == pytest.approx((dq * step).sum().item(), rel=1e-4)
    tensors[3].requires_grad_()
    torch.testing.assert_close(dw, torch.autograd.grad(product(tensors[0]), tensors[3])[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on the CPU")
@pytest.mark.parametrize(("block", "window"), [(1, 1), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_finds_the_same(dtype, block, window):
    tensors, options, dout = problem(dtype)
    make_router_q, options = with_blocks(options, block, window)
    options["make_router_q"] = make_router_q
    ours = router_gradient(dout, *tensors, **options, backend="triton")
    truth = router_gradient(dout.double(), *[t.double() for t in tensors], **options)
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
