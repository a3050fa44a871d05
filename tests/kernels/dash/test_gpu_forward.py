"""The Triton forward pass on a GPU: pytest -m gpu tests/kernels"""

import pytest
import torch
from dash_cases import TOLERANCE, Case, call, covering_array, error_against_reference, relative_error

from dash_train.kernels.dash import dash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

CASES = covering_array()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case):
    error, stats, truth = error_against_reference(*call(case, 150 if case.chunk_size == 16 else 11, "cuda"))
    assert error < TOLERANCE[case.dtype]
    assert stats.residual <= 1e-6
    assert torch.equal(stats.active_chunks, truth.active_chunks)


@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0], ids=["dense", "middling", "sparse"])
def test_scores_computed_again_equal_the_reference(scale):
    """1,100 chunks; at the lowest scale all are candidates."""
    case = Case(dtype=torch.bfloat16, head_dim=64, group=4, documents=True, ragged=True)
    (q, *others), options = call(case, 1100, "cuda")
    options |= {"query_starts": (1096 * 16,), "routing_scale": scale}
    error, stats, truth = error_against_reference([q[:, 1096 * 16 :], *others], options)
    assert error < TOLERANCE[case.dtype]
    assert stats.residual <= 1e-6
    assert torch.equal(stats.active_chunks, truth.active_chunks)


@pytest.mark.parametrize("spread", [0.01, 0.1])
@pytest.mark.parametrize("chunks", [512, 2048, 16384])
def test_nearly_equal_scores(chunks, spread):
    """z is about 8 and its spread small: the threshold is relative to the row maximum, else it would lose digits."""
    k = torch.randn(1, chunks * 16 + 16, 1, 16, device="cuda")
    k[..., 0] = 1.0
    q = torch.randn(1, 16, 4, 16, device="cuda") * spread * 16
    q[..., 0] = 64.0
    options = {"chunk_size": 16, "query_starts": (chunks * 16,), "backend": "triton", "return_stats": True}
    _, stats = dash_attention(q, k, k, torch.zeros(1, 16, device="cuda"), **options)
    assert (stats.row_max > 7.5).all()
    assert stats.residual <= 1e-6


def test_a_first_chunk_that_everyone_attends_to():
    case = Case(dtype=torch.bfloat16, head_dim=128, group=16, chunk_size=64)
    (q, k, v, w), options = call(case, 40, "cuda")
    q[..., 0], k[:, :64, :, 0] = 8.0, 8.0
    error, stats, _ = error_against_reference([q, k, v, w], options)
    assert error < TOLERANCE[case.dtype]
    assert (stats.active_chunks[:, :, 64:] >= 1).all()


def test_pieces_equal_the_rows_of_the_whole_call():
    (q, k, v, w), options = call(Case(dtype=torch.bfloat16, group=16, chunk_size=64), 20, "cuda")
    whole = dash_attention(q, k, v, w, **options, backend="triton")
    pieces = torch.cat([q[:, 320:480], q[:, 960:1120]], 1)
    out = dash_attention(pieces, k, v, w, **options, query_starts=(320, 960), backend="triton")
    assert torch.equal(out, torch.cat([whole[:, 320:480], whole[:, 960:1120]], 1))


def test_the_host_never_waits():
    tensors, options = call(Case(dtype=torch.bfloat16, group=4), 20, "cuda")
    dash_attention(*tensors, **options, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        dash_attention(*tensors, **options, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.alone
def test_more_than_2_to_the_31_elements():
    """The last of many documents equals that document alone, but for the last bits: it is routed in other steps."""
    seq, document = 2**20 + 8192, 8192
    q = torch.randn(1, seq, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, seq, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    w = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)
    starts = (torch.arange(seq, device="cuda", dtype=torch.int32) // document * document)[None]
    out = dash_attention(q, k, v, w, routing_scale=8.0, document_starts=starts, backend="triton")
    last = [t[:, -document:] for t in (q, k, v)]
    alone = dash_attention(*last, w, routing_scale=8.0, backend="triton")
    assert relative_error(out[:, -document:], alone) < 1e-3
