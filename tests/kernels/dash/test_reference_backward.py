import pytest
import torch
from dense_dash import dense_dash

from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.reference import attention as reference
from dash_train.kernels.dash.reference import stages
from dash_train.kernels.dash.reference.fused import attend_fused

CHUNK = 4
STARTS = torch.tensor([[0] * 8 + [8] * 14, [0] * 16 + [16] * 6], dtype=torch.int32)


def inputs(seed, batch=2, seq=22, kv_heads=2, group=2, head_dim=4):
    """q, k, v and a chunk query, float64, all with gradients."""
    make = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=make).requires_grad_()

    heads = kv_heads * group
    return (
        tensor(batch, seq, heads, head_dim),
        tensor(batch, seq, kv_heads, head_dim),
        tensor(batch, seq, kv_heads, head_dim),
        tensor(kv_heads, head_dim),
    )


def smooth_inputs(prior_normalizer, **shape):
    """Inputs at which the function is smooth: a small step moves no chunk over an edge of the support or floor."""
    for seed in range(100):
        tensors = inputs(seed, **shape)
        _, trace = dense_dash(*tensors, chunk_size=3, routing_scale=4.0, prior_normalizer=prior_normalizer)
        if trace.margin > 1e-3 and trace.pbar > 1e-6:
            return tensors, trace
    raise AssertionError("no seed gives smooth inputs")


def test_gradcheck_without_normalizer():
    tensors, _ = smooth_inputs("none", batch=1, seq=11, head_dim=3)

    def attention(q, k, v, w):
        return dash_attention(q, k, v, w, chunk_size=3, routing_scale=4.0, prior_normalizer="none")

    assert torch.autograd.gradcheck(attention, tensors, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prior_normalizer", ["geometric_mean", "peak"])
def test_gradcheck_with_the_normalizer_frozen(prior_normalizer):
    """Numerical derivatives of the definition, its normalisers held at their values, against ours."""
    options = {"chunk_size": 3, "routing_scale": 4.0, "prior_normalizer": prior_normalizer, "prior_temperature": 1.7}
    tensors, trace = smooth_inputs(prior_normalizer, batch=1, seq=11, head_dim=3)
    upstream = torch.randn_like(tensors[0])
    gradients = torch.autograd.grad((dash_attention(*tensors, **options) * upstream).sum(), tensors)

    def frozen(*moved):
        with torch.no_grad():
            return (dense_dash(*moved, **options, normalizers=trace.normalizers)[0] * upstream).sum()

    step = 1e-6
    for i, gradient in enumerate(gradients):
        for direction in torch.randn(8, *gradient.shape, dtype=torch.float64):
            ahead, behind = list(tensors), list(tensors)
            ahead[i], behind[i] = tensors[i] + step * direction, tensors[i] - step * direction
            numerical = (frozen(*ahead) - frozen(*behind)) / (2 * step)
            torch.testing.assert_close((gradient * direction).sum(), numerical, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("document_starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("prior_normalizer", ["geometric_mean", "none", "peak"])
def test_values_and_gradients_equal_the_definition(prior_normalizer, group, document_starts):
    tensors = inputs(seed=group, group=group)
    options = {
        "chunk_size": CHUNK,
        "routing_scale": 5.0,
        "prior_normalizer": prior_normalizer,
        "prior_temperature": 1.7,  # the definition ignores it for "none", and so must we
        "document_starts": document_starts,
    }
    out = dash_attention(*tensors, **options)
    expected = dense_dash(*tensors, **options)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad((out * upstream).sum(), tensors)
    for gradient, truth in zip(gradients, torch.autograd.grad((expected * upstream).sum(), tensors), strict=True):
        assert (gradient - truth).norm() <= 1e-10 * truth.norm()


def test_no_routing_gradient_below_the_floor():
    """With a chunk at pbar < 1e-6: its log-prior passes no gradient, its part of the threshold's gradient stays."""
    options = {"chunk_size": CHUNK, "routing_scale": 5.0, "prior_normalizer": "peak"}
    tensors = inputs(seed=48, batch=1)
    assert dense_dash(*tensors, **options)[1].pbar < 1e-6
    upstream = torch.randn_like(tensors[0])
    ours = torch.autograd.grad((dash_attention(*tensors, **options) * upstream).sum(), tensors)
    truth = torch.autograd.grad((dense_dash(*tensors, **options)[0] * upstream).sum(), tensors)
    for gradient, expected in zip(ours, truth, strict=True):
        assert (gradient - expected).norm() <= 1e-10 * expected.norm()


def test_gradients_in_blocks_equal_gradients_in_one(monkeypatch):
    tensors = inputs(seed=5, seq=40)
    options = {"chunk_size": CHUNK, "routing_scale": 5.0}
    upstream = torch.randn_like(tensors[0])
    whole = torch.autograd.grad((dash_attention(*tensors, **options) * upstream).sum(), tensors)
    monkeypatch.setitem(reference.SCORES_PER_BLOCK, "cpu", 1)
    pieces = torch.autograd.grad((dash_attention(*tensors, **options) * upstream).sum(), tensors)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_eligible_chunk_gives_the_router_no_gradient():
    q, k, v, w = inputs(seed=1, seq=2 * CHUNK)
    out = dash_attention(q, k, v, w, chunk_size=CHUNK)
    (gradient,) = torch.autograd.grad(out.square().sum(), w)
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_get_gradients_of_their_own_type(dtype):
    exact = inputs(seed=2)
    halves = [t.detach().to(dtype).requires_grad_() for t in exact]
    rounded = [t.detach().double().requires_grad_() for t in halves]
    options = {"chunk_size": CHUNK, "prior_normalizer": "peak"}
    out = dash_attention(*halves, **options)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().sum(), halves)
    truth = torch.autograd.grad(dash_attention(*rounded, **options).sum(), rounded)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - expected).norm() <= 1e-2 * expected.norm() + 1e-6


def test_the_fused_softmax_equals_the_plain_one():
    torch.manual_seed(0)
    batch, kv_heads, group, rows, keys, dim = 2, 2, 3, 8, 16, 4
    shapes = [(batch, kv_heads, group, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    prior = torch.randn(batch, kv_heads, rows, keys // CHUNK, dtype=torch.float64)
    prior[..., 1] = -torch.inf
    prior.requires_grad_()
    positions = torch.arange(keys - rows, keys)[None]
    bias = stages.token_bias(prior, positions, CHUNK)
    plain = stages.attend(*tensors, prior, positions, CHUNK)
    fused = attend_fused(*tensors, bias)
    torch.testing.assert_close(fused, plain)
    upstream = torch.randn_like(plain)
    inputs = (*tensors, prior)
    for one, other in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (fused, plain)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32_on_cuda_equals_float64(head_dim):
    """Its softmax is the fused one: as exact as fp32 elsewhere."""
    torch.manual_seed(0)
    starts = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    starts[1, 320:] = 320
    shapes = [(2, 1000, heads, head_dim) for heads in (8, 2, 2)]
    tensors = [torch.randn(shape, device="cuda") for shape in (*shapes, (2, head_dim))]
    options = {"routing_scale": 12.0, "prior_normalizer": "peak", "document_starts": starts, "backend": "reference"}
    single, double = ([t.to(dtype).requires_grad_() for t in tensors] for dtype in (torch.float32, torch.float64))
    out, stats = dash_attention(*single, **options, return_stats=True)
    exact = dash_attention(*double, **options, support=stats.support())
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, single, upstream)
    truth = torch.autograd.grad(exact, double, upstream.double())
    for one, expected in zip((out, *gradients), (exact, *truth), strict=True):
        assert (one.double() - expected).norm() <= 2e-5 * expected.norm()
