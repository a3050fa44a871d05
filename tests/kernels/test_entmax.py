import pytest
import torch
from entmax import entmax15 as entmax15_oracle

from dash_train.kernels.entmax import entmax15


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_values_and_gradients_equal_the_entmax_package(spread, dim):
    scores = (torch.randn(5, 7, 40, dtype=torch.float64) * spread).requires_grad_()
    weights = torch.randn_like(scores)
    ours, oracle = entmax15(scores, dim), entmax15_oracle(scores, dim)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), scores)
    (expected,) = torch.autograd.grad((oracle * weights).sum(), scores)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("entries", [1, 64, 1024, 16384])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 10.0])
def test_float32_sums_to_one_at_any_length(entries, spread):
    scores = torch.randn(8, entries) * spread + 1000.0
    p = entmax15(scores)
    assert (p.double().sum(-1) - 1).abs().max() < 2e-6
    exact = entmax15(scores.double())
    assert (p - exact).abs().max() < 2e-6


def test_minus_infinity_gets_nothing():
    scores = torch.tensor(
        [[1.0, -torch.inf, 1.0], [-torch.inf] * 3, [-torch.inf, -5.0, -torch.inf]], requires_grad=True
    )
    p = entmax15(scores)
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    p[0, 0].backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    scores = torch.randn(4, 100).to(dtype)
    p = entmax15(scores)
    assert p.dtype == dtype
    assert torch.equal(p, entmax15(scores.float()).to(dtype))


def test_gradcheck():
    scores = torch.tensor([[0.3, -0.2, 1.1, -4.0], [2.0, 2.0, 2.1, 1.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax15, (scores,))
