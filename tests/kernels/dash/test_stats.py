import pytest
import torch

from dash_train.kernels.dash import (
    count_eligible,
    dash_attention,
    find_routing_scale,
    router_queries,
    routing_density,
    routing_scale,
    routing_totals,
    sample_blocks,
)
from dash_train.kernels.entmax import entmax15

CHUNK = 16
STARTS = torch.tensor([[0] * 48 + [48] * 80, [0] * 128], dtype=torch.int32)


def inputs(seq=128, heads=8, kv_heads=2):
    q = torch.randn(2, seq, heads, 16)
    return q, torch.randn(2, seq, kv_heads, 16), torch.randn(2, seq, kv_heads, 16), torch.zeros(kv_heads, 16)


def run(q, k, v, w, **options):
    return dash_attention(q, k, v, w, chunk_size=CHUNK, routing_scale=6.0, return_stats=True, **options)[1]


def test_counts_agree_with_the_support():
    stats = run(*inputs(), document_starts=STARTS)
    support = stats.support()
    assert support.shape == (2, 8, 128, 8)
    routed = support.unflatten(1, (2, 4)).any(2)
    assert torch.equal(stats.active_chunks, routed.sum(-1).int())
    assert torch.equal(stats.union_chunks, routed.unflatten(2, (8, 16)).any(3).sum(-1).int())
    assert torch.equal(stats.eligible_chunks, (torch.arange(128) // CHUNK - STARTS // CHUNK).int())
    assert stats.residual < 1e-6
    assert stats.density == routed.sum().double() / (2 * stats.eligible_chunks.sum())
    assert stats.union_factor == 16 * stats.union_chunks.sum().double() / routed.sum()
    assert 1 < stats.union_factor < 16


def test_thresholds_are_those_of_the_routing_scores():
    """With a zero chunk query the summary is the mean key."""
    q, k, v, w = inputs()
    stats = run(q, k, v, w)
    means = k.unflatten(1, (-1, CHUNK)).mean(2).repeat_interleave(4, 2)
    scores = 6.0 / 4 * torch.einsum("bthd,bchd->bhtc", q, means)
    last = scores[:, :, -1, :-1]
    z = last / 2 - stats.row_max[:, :, -1, None]
    torch.testing.assert_close(z.amax(-1), torch.zeros(2, 8), rtol=0, atol=1e-6)
    p = (z - stats.tau[:, :, -1, None]).clamp(min=0).square()
    torch.testing.assert_close(p, entmax15(last), rtol=0, atol=1e-5)
    pbar = p.unflatten(1, (2, 4)).mean(2)
    log_mean = torch.where(pbar > 0, pbar.log(), 0).sum(-1) / (pbar > 0).sum(-1)
    torch.testing.assert_close(stats.normalizer[:, :, -1], log_mean, rtol=1e-3, atol=1e-3)


def test_statistics_are_the_same_in_training_and_detached():
    q, k, v, w = inputs()
    expected = run(q, k, v, w)
    stats = run(q.requires_grad_(), k, v, w)
    for name in ("tau", "row_max", "normalizer", "active_chunks", "union_chunks", "residual"):
        assert torch.equal(getattr(stats, name), getattr(expected, name))
        assert not getattr(stats, name).requires_grad


def test_summary_adds_up_real_tokens_only():
    stats = run(*inputs(), document_starts=STARTS)
    everything = stats.summary()
    assert everything.active / everything.eligible == stats.density
    assert everything.union / everything.tiled_active == stats.union_factor
    assert everything.residual == stats.residual

    real = torch.ones(2, 128, dtype=torch.bool)
    real[0, 40:48] = False  # half a tile of 16 tokens
    real[1, 96:] = False  # two tiles
    part = stats.summary(real)
    assert part.active == stats.active_chunks.mul(real[:, None]).sum()
    assert part.eligible == stats.eligible_chunks.mul(real).sum() * 2
    whole_tiles = torch.ones(2, 8, dtype=torch.bool)
    whole_tiles[0, 2] = whole_tiles[1, 6:] = False
    assert part.union == 16 * stats.union_chunks.mul(whole_tiles[:, None]).sum()
    assert part.tiled_active == stats.active_chunks.unflatten(2, (8, 16)).sum(-1).mul(whole_tiles[:, None]).sum()


def test_layers_are_totalled_together_as_each_alone():
    layers = [run(*inputs(), document_starts=STARTS) for _ in range(3)]
    real = torch.ones(2, 128, dtype=torch.bool)
    real[1, 90:] = False
    eligible = count_eligible(STARTS, (0,), 128, CHUNK)
    together = routing_totals([layer.counts for layer in layers], eligible, real, 1)
    for index, layer in enumerate(layers):
        assert layer.summary(real) == tuple(total[index] for total in together)
    assert len({total.item() for total in together.active}) > 1


def test_tiles_of_pieces_and_of_a_ragged_end():
    """G = 3: tiles of 21 tokens, begun anew with each piece."""
    q, k, v, w = inputs(heads=6)
    whole = run(q, k, v, w)
    assert whole.union_chunks.shape == (2, 2, 7)
    pieces = run(q[:, :64], k, v, w, query_starts=(0, 64))
    assert pieces.union_chunks.shape == (2, 2, 4)
    real_tiles = pieces.summary()
    assert real_tiles.tiled_active == pieces.active_chunks[:, :, [*range(21), *range(32, 53)]].sum()


def test_nothing_eligible():
    stats = run(*(t[:, :10] if t.dim() == 4 else t for t in inputs()))
    assert stats.density == 0 and stats.union_factor == 0 and stats.residual == 0
    assert not stats.support().any()


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_routing_scale_is_found(target, block):
    q, k, v, w = inputs(heads=2)
    real = torch.ones(2, 128, dtype=torch.bool)
    real[:, 100:] = False
    router_q = router_queries(q, STARTS, block=block)
    layout = {"chunk_size": CHUNK, "routing_block": block, "document_starts": STARTS}
    scale = find_routing_scale(router_q, k, w, target, **layout, real=real)
    density = routing_density(router_q, k, w, routing_scale=scale, **layout, real=real)
    assert target - 0.01 * block < density <= target
    _, stats = dash_attention(q, k, v, w, **layout, router_q=router_q, routing_scale=scale, return_stats=True)
    totals = stats.summary(real)
    assert density == totals.active / totals.eligible


def test_a_row_that_ends_within_a_block():
    q, k, v, w = inputs(seq=122)
    options = {"chunk_size": CHUNK, "routing_block": 8, "routing_scale": 6.0}
    router_q = router_queries(q, block=8, window=8)
    _, stats = dash_attention(q, k, v, w, router_q=router_q, return_stats=True, **options)
    assert routing_density(router_q, k, w, **options) == stats.density


@pytest.mark.parametrize("query_starts", [(0,), (0, 256)], ids=["whole", "pieces"])
@pytest.mark.parametrize("block", [1, 8])
def test_a_sample_stands_for_many_blocks(monkeypatch, query_starts, block):
    """Of 512 tokens 128 in runs of two chunks; the search finds nearly the scale of all."""
    monkeypatch.setattr(routing_scale, "RUNS", 4)
    torch.manual_seed(0)
    q, k, w = torch.randn(1, 512, 4, 16), torch.randn(1, 512, 2, 16), torch.randn(2, 16)
    q += torch.randn(1, 8, 1, 16).repeat_interleave(64, 1)  # queries differ from place to place
    real = torch.rand(1, 512) < 0.9
    layout = {"chunk_size": CHUNK, "routing_block": block}
    router_q = router_queries(q, None, query_starts, block)
    whole = {**layout, "query_starts": query_starts, "real": real}
    exact = find_routing_scale(router_q, k, w, 0.5, **whole)
    looked_at, marks, starts = sample_blocks(router_q, real, query_starts, 128 // block, seq=512, **layout)
    assert looked_at.shape[1] == 128 // block and marks.shape[1] == 128
    assert len(starts) == 4 and not any(start % CHUNK for start in starts)
    for number, start in enumerate(starts):
        assert torch.equal(marks[:, number * 32 :][:, :32], real[:, start : start + 32])
        assert torch.equal(looked_at[:, number * 32 // block], router_q[:, start // block])
    sampled = find_routing_scale(looked_at, k, w, 0.5, **layout, query_starts=starts, real=marks)
    assert sampled != exact
    assert routing_density(router_q, k, w, routing_scale=sampled, **whole) == pytest.approx(0.5, abs=0.04)

    everything = sample_blocks(router_q, real, query_starts, 512 // block, seq=512, **layout)
    assert everything[0] is router_q and everything[2] == query_starts


@pytest.mark.parametrize("blocks", [8, 64, 200])
def test_ranks_that_share_a_row_sample_what_one_does(blocks):
    q, real = torch.randn(1, 4096, 2, 8), torch.ones(1, 4096, dtype=torch.bool)

    def sampled(*query_starts: int) -> set[int]:
        rows = slice(0, 1024 * len(query_starts))
        *_, marks, starts = sample_blocks(q[:, rows], real[:, rows], query_starts, blocks, seq=4096, chunk_size=CHUNK)
        run = marks.shape[1] // len(starts)
        return {start + token for start in starts for token in range(run)}

    *_, marks, starts = sample_blocks(q, real, (0,), blocks, seq=4096, chunk_size=CHUNK)
    run = marks.shape[1] // len(starts)
    whole = {start + token for start in starts for token in range(run)}
    assert sampled(0, 3072) | sampled(1024, 2048) == whole


def test_unreachable_density_gives_a_scale_near_the_floor():
    q, k, _, w = inputs()
    scale = find_routing_scale(q, k, w, 0.01, chunk_size=CHUNK)
    floor = routing_density(q, k, w, routing_scale=2.0**12, chunk_size=CHUNK)
    assert routing_density(q, k, w, routing_scale=scale, chunk_size=CHUNK) <= 1.02 * floor
    assert scale < 2.0**12


def test_target_density_is_checked():
    q, k, _, w = inputs()
    with pytest.raises(ValueError, match=r"^target is 0"):
        find_routing_scale(q, k, w, 0.0, chunk_size=CHUNK)
