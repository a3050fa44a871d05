import pytest
import torch
from dense_dash import dense_dash
from torch.nn import functional as F

from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference import attention as reference

CONFIG = DashConfig(64, 1.0, "peak", 1.0)


def inputs(batch=2, seq=96, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64):
    q = torch.randn(batch, seq, heads, head_dim, dtype=dtype)
    k = torch.randn(batch, seq, kv_heads, head_dim, dtype=dtype)
    v = torch.randn(batch, seq, kv_heads, head_dim, dtype=dtype)
    return q, k, v, torch.randn(kv_heads, head_dim, dtype=dtype)


def row_of_documents(lengths, batch, seq):
    """document_starts [batch, seq] of documents one after the other, the last up to the end of the row."""
    starts = torch.zeros(batch, seq, dtype=torch.int32)
    position = 0
    for length in lengths:
        starts[:, position:] = position
        position += length
    return starts


@pytest.mark.parametrize("seq", [1, 7, 8, 9, 64, 65, 97])
def test_any_length(seq):
    q, k, v, w = inputs(batch=1, seq=seq)
    out = dash_attention(q, k, v, w, chunk_size=8, routing_scale=3.0)
    expected, _ = dense_dash(q, k, v, w, chunk_size=8, routing_scale=3.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (16, 1), (5, 1)])
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_any_group_and_head_dim(heads, kv_heads, head_dim):
    q, k, v, w = inputs(batch=1, seq=37, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    out = dash_attention(q, k, v, w, chunk_size=8, routing_scale=3.0)
    expected, _ = dense_dash(q, k, v, w, chunk_size=8, routing_scale=3.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_within_the_first_chunk_it_is_causal_attention():
    q, k, v, w = inputs(seq=64)
    out = dash_attention(q, k, v, w, chunk_size=64)
    dense = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=0, atol=1e-12)


def test_a_hot_temperature_leaves_attention_over_the_routed_chunks():
    """At 1e6 the prior is a mask; with a routing scale near 0 nothing is masked, and that is causal attention."""
    q, k, v, w = inputs()
    out = dash_attention(q, k, v, w, chunk_size=16, routing_scale=1e-6, prior_temperature=1e12)
    dense = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("prior_normalizer", ["geometric_mean", "none", "peak"])
def test_pieces_of_a_row_equal_the_same_rows_of_the_whole(prior_normalizer):
    q, k, v, w = inputs(seq=112)
    options = {
        "chunk_size": 16,
        "routing_scale": 4.0,
        "prior_normalizer": prior_normalizer,
        "document_starts": row_of_documents([48, 64], 2, 112),
    }
    whole = dash_attention(q, k, v, w, **options)
    rows = [*range(16, 48), *range(80, 112)]
    pieces = dash_attention(q[:, rows], k, v, w, query_starts=(16, 80), **options)
    torch.testing.assert_close(pieces, whole[:, rows], rtol=0, atol=1e-12)
    last = dash_attention(q[:, 96:], k, v, w, query_starts=(96,), **options)
    torch.testing.assert_close(last, whole[:, 96:], rtol=0, atol=1e-12)


def test_a_change_in_one_document_leaves_the_others_bit_equal():
    q, k, v, w = inputs(seq=128, dtype=torch.float32)
    options = {"chunk_size": 16, "routing_scale": 4.0, "document_starts": row_of_documents([32, 48, 48], 2, 128)}
    before = dash_attention(q, k, v, w, **options)
    for tensor in (q, k, v):
        tensor[:, 32:80] = torch.randn_like(tensor[:, 32:80])
    after = dash_attention(q, k, v, w, **options)
    assert torch.equal(before[:, :32], after[:, :32])
    assert torch.equal(before[:, 80:], after[:, 80:])
    assert not torch.equal(before[:, 32:80], after[:, 32:80])


@pytest.mark.parametrize("offset", [0, 16, 80])
def test_a_packed_document_equals_itself_alone(offset):
    length = 40
    q, k, v, w = inputs(seq=length)
    alone = dash_attention(q, k, v, w, chunk_size=16, routing_scale=4.0)
    packed = [torch.randn(2, 160, *tensor.shape[2:], dtype=tensor.dtype) for tensor in (q, k, v)]
    for row, tensor in zip(packed, (q, k, v), strict=True):
        row[:, offset : offset + length] = tensor
    starts = row_of_documents([offset, 48], 2, 160) if offset else row_of_documents([48], 2, 160)
    out = dash_attention(*packed, w, chunk_size=16, routing_scale=4.0, document_starts=starts)
    torch.testing.assert_close(out[:, offset : offset + length], alone, rtol=0, atol=1e-12)


def test_the_future_is_invisible():
    q, k, v, w = inputs()
    before = dash_attention(q, k, v, w, chunk_size=16)
    k[:, 50:], v[:, 50:] = 9.0, 9.0
    after = dash_attention(q, k, v, w, chunk_size=16)
    assert torch.equal(before[:, :50], after[:, :50])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    exact = [t.to(dtype) for t in inputs()]
    out = dash_attention(*exact, chunk_size=16)
    assert out.dtype == dtype
    expected = dash_attention(*(t.double() for t in exact), chunk_size=16)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * rounding, atol=2e-5)


@pytest.mark.gpu
def test_cuda_equals_the_cpu():
    tensors = [t.requires_grad_() for t in inputs()]
    options = {"chunk_size": 16, "routing_scale": 4.0, "document_starts": row_of_documents([32, 64], 2, 96)}
    expected, stats = dash_attention(*tensors, **options, return_stats=True)
    upstream = torch.randn_like(expected)
    truth = torch.autograd.grad((expected * upstream).sum(), tensors)
    on_gpu = [t.detach().cuda().requires_grad_() for t in tensors]
    options["document_starts"] = options["document_starts"].cuda()
    out, gpu_stats = dash_attention(*on_gpu, **options, backend="reference", return_stats=True)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-10)
    assert torch.equal(gpu_stats.support().cpu(), stats.support())
    for gradient, right in zip(torch.autograd.grad((out * upstream.cuda()).sum(), on_gpu), truth, strict=True):
        assert (gradient.cpu() - right).norm() <= 1e-9 * right.norm()


def test_given_support_is_the_routed_set():
    q, k, v, w = inputs()
    options = {"chunk_size": 16, "routing_scale": 4.0, "prior_normalizer": "peak"}
    out, stats = dash_attention(q, k, v, w, **options, return_stats=True)
    again, repeated = dash_attention(q, k, v, w, **options, support=stats.support(), return_stats=True)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(repeated.tau, stats.tau, atol=1e-12, rtol=0)

    every = torch.ones_like(stats.support()) & (torch.arange(6) < torch.arange(96)[:, None] // 16)
    _, forced = dash_attention(q, k, v, w, **options, support=every, return_stats=True)
    assert torch.equal(forced.active_chunks, forced.eligible_chunks[:, None].expand_as(forced.active_chunks))


def test_blocks_stay_within_the_memory_budget():
    """What bounds memory at 16K tokens: no block's scores exceed the budget, and the blocks cover the query once."""
    q, k = torch.empty(1, 16384, 8, 1), torch.empty(1, 16384, 2, 1)
    blocks = reference.query_blocks(q, k, torch.zeros(1, 16384, dtype=torch.int32), (0,), CONFIG)
    for block in blocks:
        rows = block.queries.stop - block.queries.start
        keys = 64 * (block.chunks.stop - block.chunks.start)
        assert 8 * rows * keys <= reference.SCORES_PER_BLOCK["cpu"]
    assert [row for block in blocks for row in range(block.queries.start, block.queries.stop)] == list(range(16384))


def test_blocks_skip_what_no_row_may_see():
    q, k = torch.empty(8, 4096, 8, 1), torch.empty(8, 4096, 2, 1)
    blocks = reference.query_blocks(q, k, row_of_documents([2048, 2048], 8, 4096), (0,), CONFIG)
    assert blocks[0].chunks == slice(0, 1)
    assert blocks[-1].chunks == slice(32, 64)


def replaced(**changes):
    arguments = dict(zip(("q", "k", "v", "chunk_query"), inputs(), strict=True))
    return {**arguments, "chunk_size": 16, **changes}


STARTS = torch.zeros(2, 96, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(2, 96, 4)}),
        ("q", {"q": torch.zeros(2, 0, 4, 16)}),
        ("q", {"q": torch.zeros(2, 96, 4, 16, dtype=torch.int64)}),
        ("q", {"q": torch.zeros(2, 96, 3, 16, dtype=torch.float64)}),
        ("k", {"k": torch.zeros(2, 96, 2, 8)}),
        ("k", {"k": torch.zeros(1, 96, 2, 16)}),
        ("k", {"k": torch.zeros(2, 96, 2, 16, dtype=torch.float32)}),
        ("v", {"v": torch.zeros(2, 95, 2, 16)}),
        ("v", {"v": torch.zeros(2, 96, 2, 16, dtype=torch.float32)}),
        ("chunk_query", {"chunk_query": torch.zeros(4, 16)}),
        ("chunk_size", {"chunk_size": 0}),
        ("routing_scale", {"routing_scale": 0.0}),
        ("routing_scale", {"routing_scale": float("nan")}),
        ("prior_temperature", {"prior_temperature": -1.0}),
        ("prior_normalizer", {"prior_normalizer": "mean"}),
        ("backend", {"backend": "cuda"}),
        ("document_starts", {"document_starts": STARTS[:1]}),
        ("document_starts", {"document_starts": STARTS.float()}),
        ("query_starts", {"query_starts": ()}),
        ("query_starts", {"query_starts": (0, 16, 32, 48, 64)}),
        ("query_starts", {"query_starts": (16,)}),
        ("query_starts", {"query_starts": (8, 40)}),
        ("support", {"support": torch.ones(2, 4, 96, 5, dtype=torch.bool)}),
        ("support", {"support": torch.ones(2, 4, 96, 6)}),
    ],
)
def test_errors_name_the_argument(name, changes):
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        dash_attention(**replaced(**changes))
