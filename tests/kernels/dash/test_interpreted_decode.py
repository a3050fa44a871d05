"""The Triton kernels of decoding; without a GPU they run interpreted."""

import pytest
import torch
from dash_cases import Case, relative_error
from decode_cases import check_stages, decode_call

from dash_train.kernels.dash import dash_decode, update_summaries
from dash_train.kernels.dash.triton import decode_attend, decode_routing

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; test_gpu_decode.py has the GPU's cases"),
]

CASES = [
    Case(group=1, chunk_size=16),
    Case(group=2, chunk_size=64, head_dim=96, normalizer="peak"),
    Case(dtype=torch.float16, group=4, chunk_size=32, head_dim=64, normalizer="none"),
    Case(group=6, chunk_size=128, normalizer="peak"),
    Case(dtype=torch.float16, group=8, chunk_size=64, head_dim=128),
    Case(group=16, chunk_size=16, head_dim=256),
    Case(dtype=torch.float16, group=32, chunk_size=16, normalizer="peak"),
]


def lengths_of(case: Case) -> list[int]:
    """None, one token, one chunk, a chunk begun, chunks complete, chunks and a part."""
    size = case.chunk_size
    return [0, 1, size, size + 1, 5 * size, 7 * size + 3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_is_exact(case):
    half = case.dtype == torch.float16
    check_stages(decode_call(case, lengths_of(case), "cpu"), 2e-6, 1e-3 if half else 2e-6)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_equals_the_reference(case):
    call = decode_call(case, lengths_of(case), "cpu")
    out, active = dash_decode(*call.tensors, **call.options, backend="triton", return_active=True)
    expected, expected_active = dash_decode(*call.double(), **call.options, backend="reference", return_active=True)
    assert out.dtype == case.dtype
    assert relative_error(out, expected) < (1e-3 if case.dtype == torch.float16 else 2e-6)
    assert not out[0].any()
    assert active.dtype == torch.int32 and torch.equal(active, expected_active)


def test_lists_that_are_written_in_several_steps(monkeypatch):
    monkeypatch.setattr(decode_routing, "LIST_WIDTH", 64)
    check_stages(decode_call(Case(group=4), [2100, 150 * 16, 0, 1000], "cpu"), 2e-6, 2e-6)


@pytest.mark.parametrize("programs", [1, 2, 40, 1000])
def test_any_number_of_programs(monkeypatch, programs):
    call = decode_call(Case(group=2), [37, 0, 1, 160, 0], "cpu")
    expected = dash_decode(*call.double(), **call.options, backend="reference")
    monkeypatch.setattr(decode_attend, "PROGRAMS_ON_CPU", programs)
    assert relative_error(dash_decode(*call.tensors, **call.options, backend="triton"), expected) < 2e-6


def test_caches_stored_in_another_order():
    call = decode_call(Case(group=4), [70, 33], "cpu")
    expected = dash_decode(*call.tensors, **call.options, backend="triton")
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in call.tensors[1:4]]
    assert torch.equal(dash_decode(call.q, *turned, call.lengths, **call.options, backend="triton"), expected)


def test_lengths_may_be_int64():
    call = decode_call(Case(group=4), [70, 33], "cpu")
    expected = dash_decode(*call.tensors, **call.options, backend="triton")
    out = dash_decode(*call.tensors[:4], call.lengths.long(), **call.options, backend="triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_equals_the_reference(case):
    call = decode_call(case, lengths_of(case), "cpu")
    w = torch.randn(2, case.head_dim).to(case.dtype)
    updated = {}
    for backend in ("triton", "reference"):
        updated[backend] = torch.full_like(call.summaries, 7.0)
        arguments = (call.k_cache, updated[backend], call.lengths, w)
        update_summaries(*arguments, chunk_size=case.chunk_size, backend=backend)
    torch.testing.assert_close(updated["triton"], updated["reference"], rtol=1e-5, atol=1e-6)
    changed = (updated["triton"] != 7.0).any(-1).any(-1)
    assert changed.nonzero().tolist() == [[2, 0], [4, 4]]  # the sequences of one and of five complete chunks


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("does not compute in torch.float64", lambda call: call.double()),
        ("whose last dimension is contiguous", lambda call: (call.q, call.k_cache.mT.contiguous().mT, *call[2:5])),
    ],
)
def test_what_triton_cannot_do_is_said(message, change):
    call = decode_call(Case(group=4), [70, 33], "cpu")
    with pytest.raises(ValueError, match=f"backend='triton' of dash_decode .*{message}"):
        dash_decode(*change(call), **call.options, backend="triton")
    dash_decode(*change(call), **call.options)
