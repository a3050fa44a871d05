"""Routing blocks: the reference against the definition, token by token, and what a block may look at."""

import pytest
import torch
from dense_dash import dense_dash

from dash_train.kernels.dash import dash_attention, router_queries
from dash_train.kernels.dash.reference import attention as reference

NORMALIZERS = ("geometric_mean", "none", "peak")
SIZES = (1, 4, 16, 64)
OPTIONS = {"chunk_size": 16, "routing_scale": 5.0, "prior_normalizer": "peak", "prior_temperature": 1.7}


def inputs(seq, batch=2, kv_heads=1, group=2, head_dim=3):
    """q, k, v and a chunk query, float64, all with gradients."""
    shapes = [(batch, seq, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (*shapes, (kv_heads, head_dim))]


def two_documents(batch, seq, second):
    """document_starts [batch, seq]: the last row's second document begins at `second`; the other rows hold one."""
    starts = torch.zeros(batch, seq, dtype=torch.int32)
    starts[-1, second:] = second
    return starts


def attention(q, k, v, w, window, before=None, **options):
    """dash_attention with the routers' queries of its own q."""
    positions = options.get("document_starts"), options.get("query_starts", (0,))
    router_q = router_queries(q, *positions, options["routing_block"], window, before)
    return dash_attention(q, k, v, w, router_q=router_q, **options)


def assert_same(ours, definition, tensors):
    """Values and gradients, to 1e-10 of their norms."""
    torch.testing.assert_close(ours, definition, rtol=0, atol=1e-11)
    upstream = torch.randn_like(ours)
    found, truth = (torch.autograd.grad((out * upstream).sum(), tensors) for out in (ours, definition))
    for gradient, expected in zip(found, truth, strict=True):
        assert expected.any() and (gradient - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("window", SIZES)
@pytest.mark.parametrize("block", SIZES)
def test_values_and_gradients_equal_the_definition(block, window):
    """With documents and a last block that is not whole; every block and every window with all three normalisers."""
    chunk_size = min(4 * block, 64)
    seq = 3 * chunk_size + chunk_size // 2 + 1
    tensors = inputs(seq)
    options = {
        **OPTIONS,
        "chunk_size": chunk_size,
        "prior_normalizer": NORMALIZERS[(SIZES.index(block) + SIZES.index(window)) % 3],
        "routing_block": block,
        "document_starts": two_documents(2, seq, chunk_size),
    }
    definition, _ = dense_dash(*tensors, **options, routing_window=window)
    assert_same(attention(*tensors, window, **options), definition, tensors)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_the_routers_queries_have_gradients_of_their_own(block):
    seq = 3 * 16 + 10
    tensors = inputs(seq, kv_heads=2)
    router_q = torch.randn(2, -(-seq // block), 4, 3, dtype=torch.float64).requires_grad_()
    options = {**OPTIONS, "routing_block": block, "document_starts": two_documents(2, seq, 16), "router_q": router_q}
    assert_same(dash_attention(*tensors, **options), dense_dash(*tensors, **options)[0], [*tensors, router_q])


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("window", [1, 4, 40])
def test_pieces_with_the_queries_before_them_equal_the_row(block, window):
    """As a rank of a context-parallel run calls it; what stands before the row's first position is not looked at."""
    seq, query_starts, piece = 112, (0, 64), 32
    tensors = inputs(seq)
    options = {**OPTIONS, "routing_block": block, "document_starts": two_documents(2, seq, 32)}
    definition, _ = dense_dash(*tensors, **options, routing_window=window)
    q, *others = tensors
    positions = torch.cat([torch.arange(start, start + piece) for start in query_starts])
    history = torch.cat([torch.full_like(q[:, : window - 1], torch.nan), q], 1)
    before = torch.stack([history[:, start : start + window - 1] for start in query_starts], 1)
    ours = attention(q[:, positions], *others, window, before, **options, query_starts=query_starts)
    assert_same(ours, definition[:, positions], tensors)


def test_pieces_find_each_others_queries():
    tensors = inputs(64)
    options = {**OPTIONS, "routing_block": 4}
    q, *others = tensors
    swapped = torch.cat([q[:, 32:], q[:, :32]], 1)
    ours = attention(swapped, *others, 24, **options, query_starts=(32, 0))
    whole = attention(*tensors, 24, **options)
    assert_same(ours, torch.cat([whole[:, 32:], whole[:, :32]], 1), tensors)


def test_blocks_of_rows_equal_the_whole(monkeypatch):
    """However few rows the reference computes at a time."""
    tensors = inputs(70)
    options = {**OPTIONS, "routing_block": 8, "document_starts": two_documents(2, 70, 32)}
    whole = attention(*tensors, 8, **options)
    monkeypatch.setitem(reference.SCORES_PER_BLOCK, "cpu", 1)
    assert_same(attention(*tensors, 8, **options), whole, tensors)


def test_a_block_and_window_of_one_are_the_papers():
    tensors = inputs(70)
    q = tensors[0]
    assert router_queries(q, block=1, window=1) is q
    upstream = torch.randn_like(q)
    paper, ours = dash_attention(*tensors, **OPTIONS), attention(*tensors, 1, **OPTIONS, routing_block=1)
    assert torch.equal(ours, paper)
    found, truth = (torch.autograd.grad((out * upstream).sum(), tensors) for out in (ours, paper))
    for gradient, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def changed_at(tensors, position):
    """q, k and v with another token at one position, and the chunk query."""
    *at_positions, w = tensors
    place = (torch.arange(at_positions[0].shape[1]) == position)[:, None, None]
    return [*(torch.where(place, torch.randn_like(x), x) for x in at_positions), w]


@pytest.mark.parametrize("position", [40, 41, 47])
def test_a_token_changes_nothing_before_it(position):
    tensors = inputs(64)
    options = {**OPTIONS, "routing_block": 8}
    with torch.no_grad():
        one, other = (attention(*x, 24, **options) for x in (tensors, changed_at(tensors, position)))
    assert torch.equal(one[:, :position], other[:, :position])
    assert not torch.equal(one[:, position], other[:, position])


def test_only_a_blocks_first_token_and_those_before_it_route_it():
    tensors = inputs(64)
    options = {**OPTIONS, "routing_block": 8, "return_stats": True}

    def stats(position):
        with torch.no_grad():
            return attention(*changed_at(tensors, position), 4, **options)[1]

    with torch.no_grad():
        before = attention(*tensors, 4, **options)[1]
    block = slice(40, 48)
    for name in ("tau", "row_max", "normalizer", "active_chunks"):
        original, second, first = (getattr(s, name)[..., block] for s in (before, stats(41), stats(40)))
        assert torch.equal(second, original)
        assert name == "active_chunks" or not torch.equal(first, original)
    assert torch.equal(stats(41).support()[:, :, block], before.support()[:, :, block])


def test_statistics_are_by_token():
    """Group 8, so that a tile is a block: then its tokens' union is what each of them routes to."""
    tensors = inputs(100, kv_heads=2, group=8)
    starts = two_documents(2, 100, 32)
    options = {**OPTIONS, "routing_block": 8, "document_starts": starts, "return_stats": True}
    with torch.no_grad():
        _, stats = attention(*tensors, 16, **options)
    routed = stats.support().unflatten(1, (2, 8)).any(2)
    assert torch.equal(stats.active_chunks, routed.sum(-1, dtype=torch.int32))
    assert torch.equal(routed, routed[:, :, torch.arange(100) // 8 * 8])
    eligible = torch.arange(100) // 16 - starts // 16
    assert torch.equal(stats.eligible_chunks, eligible.int())
    torch.testing.assert_close(stats.density.item(), (routed.sum() / (2 * eligible.sum())).item(), rtol=1e-6, atol=0)
    assert stats.union_chunks.shape == (2, 2, 13) and torch.equal(stats.union_chunks, stats.active_chunks[..., ::8])
    totals = stats.summary()
    assert totals.union == totals.tiled_active


def test_given_support_is_the_blocks():
    tensors = inputs(70)
    options = {**OPTIONS, "routing_block": 8, "return_stats": True}
    out, stats = attention(*tensors, 8, **options)
    again, _ = attention(*tensors, 8, **options, support=stats.support())
    assert_same(again, out, tensors)


ROUTER_Q = torch.zeros(2, 12, 4, 16)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("routing_block", {"routing_block": 0}),
        ("routing_block", {"routing_block": 3}),
        ("routing_block", {"routing_block": 32}),
        ("router_q", {"router_q": None}),
        ("router_q", {"router_q": ROUTER_Q[:, :11]}),
        ("router_q", {"router_q": ROUTER_Q[:, :, :2]}),
        ("router_q", {"router_q": ROUTER_Q.double()}),
        ("query_starts", {"query_starts": (0, 16), "q": torch.zeros(2, 24, 4, 16)}),
    ],
)
def test_errors_name_the_argument(name, changes):
    arguments = {"q": torch.zeros(2, 96, 4, 16), "k": torch.zeros(2, 96, 2, 16), "v": torch.zeros(2, 96, 2, 16)}
    arguments |= {"chunk_query": torch.zeros(2, 16), "chunk_size": 16, "routing_block": 8, "router_q": ROUTER_Q}
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        dash_attention(**arguments | changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(2, 96, 4)}),
        ("block", {"block": 0}),
        ("block", {"window": 0}),
        ("query_starts", {"query_starts": (0, 16, 32, 48, 64)}),
        ("query_starts", {"query_starts": (0, 48), "block": 32}),
        ("document_starts", {"document_starts": torch.zeros(1, 96, dtype=torch.int32)}),
        ("document_starts", {"document_starts": torch.zeros(2, 96)}),
        ("before", {"query_starts": (0, 96)}),
        ("before", {"before": torch.zeros(2, 1, 4, 4, 16)}),
        ("before", {"before": torch.zeros(2, 1, 3, 4, 16, dtype=torch.float64)}),
    ],
)
def test_errors_of_router_queries_name_the_argument(name, changes):
    arguments = {"q": torch.zeros(2, 96, 4, 16), "block": 8, "window": 4}
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        router_queries(**arguments | changes)
