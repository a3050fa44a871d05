"""The Triton forward pass in Triton's interpreter, on the CPU and tiny inputs. On a GPU: test_gpu_forward.py."""

import pytest
import torch
from dash_cases import TOLERANCE, Case, call, error_against_reference

from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.routing_counts import routing_counts
from dash_train.kernels.dash.triton.tiles import Shape, segments, workspace_bytes

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on the CPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CASES = [
    Case(group=4, ragged=True),
    Case(group=6, head_dim=48, chunk_size=32, normalizer="peak", documents=True),
    Case(group=16, head_dim=64, normalizer="none", documents=True, ragged=True),
    Case(group=1, chunk_size=128, ragged=True),
    Case(group=2, dtype=torch.float16),
    Case(group=4, routing_block=4, ragged=True),
    Case(group=16, head_dim=48, chunk_size=32, routing_block=16, normalizer="peak", documents=True, ragged=True),
    Case(group=6, routing_block=16, normalizer="none", ragged=True),
    Case(group=32, chunk_size=64, routing_block=64),
]


def check(case: Case, chunks: int, last_chunk_only: bool = False) -> None:
    (q, *others), options = call(case, chunks, "cpu")
    if last_chunk_only:
        start = (chunks - 1) * case.chunk_size
        q, options["query_starts"] = q[:, start:], (start,)
        if "router_q" in options:
            options["router_q"] = options["router_q"][:, start // case.routing_block :]
    error, stats, truth = error_against_reference([q, *others], options)
    assert error < TOLERANCE[case.dtype]
    assert stats.residual <= 1e-6
    assert torch.equal(stats.active_chunks, truth.active_chunks)
    assert torch.equal(stats.eligible_chunks, truth.eligible_chunks)
    routed = truth.active_chunks[:, :, None].expand(-1, -1, case.group, -1).flatten(1, 2) > 0
    torch.testing.assert_close(stats.tau[routed].double(), truth.tau[routed], rtol=0, atol=4e-6)  # of z about 10
    torch.testing.assert_close(stats.row_max[routed].double(), truth.row_max[routed], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.normalizer.double(), truth.normalizer, rtol=1e-4, atol=1e-3)
    if stats.tile == truth.tile:
        assert torch.equal(stats.union_chunks, truth.union_chunks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case):
    check(case, chunks=6)


@pytest.mark.parametrize("block", [1, 16])
def test_scores_computed_again_equal_the_reference(streamed, block):
    case = Case(group=8, head_dim=16, documents=True, ragged=True, routing_block=block)
    check(case, chunks=30, last_chunk_only=True)


@pytest.mark.parametrize("block", [1, 16])
def test_pieces_equal_the_rows_of_the_whole_call(block):
    (q, k, v, w), options = call(Case(group=4, routing_block=block), 8, "cpu")
    whole = dash_attention(q, k, v, w, **options, backend="triton")
    pieces = torch.cat([q[:, 32:64], q[:, 96:128]], 1)
    if block > 1:
        options["router_q"] = options["router_q"][:, [2, 3, 6, 7]]
    out = dash_attention(pieces, k, v, w, **options, query_starts=(32, 96), backend="triton")
    assert torch.equal(out, torch.cat([whole[:, 32:64], whole[:, 96:128]], 1))


@pytest.mark.parametrize("block", [1, 4, 16])
def test_routing_alone_counts_what_the_whole_call_counts(block):
    tensors, options = call(Case(group=8, documents=True, ragged=True, routing_block=block), 6, "cpu")
    names = ("chunk_size", "routing_scale", "prior_normalizer", "prior_temperature")
    config = DashConfig(*(options[name] for name in names), block)
    (q, k, _, w), router_q = tensors, options.get("router_q")
    active, union = routing_counts(q, k, w, router_q, config=config, document_starts=options["document_starts"])
    _, stats = dash_attention(*tensors, **options, backend="triton", return_stats=True)
    assert torch.equal(active, stats.counts.active_chunks)
    assert (union is None) == (block > stats.tile) and (union is None or torch.equal(union, stats.union_chunks))


def test_a_model_counts_by_the_tiles_of_the_kernels(tiny_model):
    """With 3 heads a group they have 16 tokens, the reference's 21."""
    tokens = torch.randint(64, (1, 64))
    by_backend = {}
    for backend in ("triton", "reference"):
        model = tiny_model("dash", heads=6)
        model.config.attention.backend = backend
        by_backend[backend] = model(tokens, labels=tokens)
    of_kernels, of_reference = by_backend["triton"], by_backend["reference"]
    assert torch.equal(of_kernels["active_chunks"], of_reference["active_chunks"])
    assert torch.equal(of_kernels["eligible_chunks"], of_reference["eligible_chunks"])
    assert torch.equal(of_kernels["union_active"], of_kernels["active_chunks"])  # all 64 tokens lie in whole tiles
    assert (of_kernels["union_chunks"] >= of_kernels["union_active"]).all()


def test_segments_change_nothing(change_tiles):
    tensors, options = call(Case(group=4), 8, "cpu")
    whole = dash_attention(*tensors, **options, backend="triton")
    change_tiles(WORKSPACE_BYTES=4000)
    assert torch.equal(dash_attention(*tensors, **options, backend="triton"), whole)


@pytest.mark.parametrize("query_starts", [(0,), (0, 65536), (4096, 131072)])
def test_segments_cover_every_query_once_within_the_workspace(query_starts):
    q_len = 100_003 * len(query_starts)
    shape = Shape(batch=1, q_len=q_len, seq=300_000, heads=32, kv_heads=2, head_dim=128, chunk_size=64)
    cut = segments(shape, query_starts)
    assert [s.row for s in cut] == [sum(s.tokens for s in cut[:i]) for i in range(len(cut))]
    assert sum(s.tokens for s in cut) == q_len
    assert all((s.position + s.tokens - 1) // 64 < s.chunks for s in cut)
    assert workspace_bytes(shape, query_starts) <= 2**29


def test_strided_inputs():
    (q, k, v, w), options = call(Case(group=4), 4, "cpu")
    expected = dash_attention(q, k, v, w, **options, backend="triton")
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(dash_attention(*transposed, w, **options, backend="triton"), expected)
    unaligned = [torch.cat([t, t], -1)[..., 1:][..., :32] for t in (q.roll(1, -1), k.roll(1, -1), v.roll(1, -1))]
    assert torch.equal(dash_attention(*unaligned, w, **options, backend="triton"), expected)


@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_nearly_equal_scores(spread):
    """512 chunks, z about 8: the threshold is relative to the row maximum, else it would lose four digits."""
    k = torch.randn(1, 512 * 16 + 16, 1, 16)
    k[..., 0] = 1.0
    q = torch.randn(1, 16, 4, 16) * spread * 16
    q[..., 0] = 64.0
    options = {"chunk_size": 16, "query_starts": (512 * 16,), "backend": "triton", "return_stats": True}
    _, stats = dash_attention(q, k, k, torch.zeros(1, 16), **options)
    assert (stats.row_max > 7.5).all()
    assert stats.residual <= 1e-6
    assert stats.active_chunks.min() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, "does not compute in torch.bfloat16 on cpu"),
        ({"head_dim": 40}, "needs a head_dim that is a multiple of 16"),
        ({"chunk_size": 8}, "needs a chunk_size of 16, 32, 64 or 128, not 8"),
    ],
)
def test_what_it_cannot_do_is_one_clear_line(change, message):
    tensors, options = call(Case()._replace(**change), 4, "cpu")
    with pytest.raises(ValueError, match=message):
        dash_attention(*tensors, **options, backend="triton")
