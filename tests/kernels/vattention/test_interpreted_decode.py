"""The Triton path on the CPU, in the interpreter, against the reference on the same chunks and samples."""

import pytest
import torch
import triton
import triton.language as tl
from vattention_cases import make_config, make_inputs, triton_and_reference

from dash_train.kernels.vattention import vattention_decode
from dash_train.kernels.vattention.reference import permutation
from dash_train.kernels.vattention.triton import permutation as permutation_triton

CASES = {
    "plain": ({}, {}),
    "denominator": ({}, {"verify": "denominator"}),
    "prior": ({"prior": True}, {"epsilon": 0.5}),
    "needles and dropped chunks": ({"bounds": True}, {}),
    "needles, dropped chunks and a prior": ({"bounds": True, "prior": True}, {"epsilon": 0.5}),
    "too many needles": ({"bounds": True}, {"epsilon": 1e-3, "max_sample": 0.02}),
    "everything is read": ({}, {"max_sample": 0.05}),
    "nothing near or heavy": ({}, {"sink": 0, "window": 0, "heavy": 0.0, "epsilon": 0.6}),
    "everything is near": ({"lengths": (1, 17)}, {}),
    "large group, odd head_dim": ({"kv_heads": 1, "group": 17, "head_dim": 40}, {"epsilon": 0.8}),
    "one head a group": ({"group": 1, "capacity": 703}, {"epsilon": 0.2}),
    "float16, chunks of 32": ({"dtype": torch.float16, "chunk_size": 32}, {"chunk_size": 32}),
}


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """Three programs for what takes 16 on a GPU."""
    for module in ("workspace", "attend", "budget"):
        monkeypatch.setattr(f"dash_train.kernels.vattention.triton.{module}.SPLITS", 3)


@triton.jit
def write_permutation(out_ptr, seed_ptr, size_ptr, BLOCK: tl.constexpr):
    size = tl.load(size_ptr)
    index = tl.arange(0, BLOCK)
    key = permutation_triton.sample_key(tl.load(seed_ptr), tl.program_id(0))
    places = permutation_triton.permute(tl.minimum(index, size - 1), size, key)
    tl.store(out_ptr + tl.program_id(0) * size + index, places, mask=index < size)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", [0, -3, 2**40 + 17])
def test_permutations_are_the_same(size, seed):
    out, seed = torch.empty(3, size, dtype=torch.int32), torch.tensor([seed])
    write_permutation[(3,)](out, seed, torch.tensor([size], dtype=torch.int32), BLOCK=1024)
    key = permutation.sample_key(seed, 3)[0, :, None]
    assert torch.equal(out.long(), permutation.permute(torch.arange(size), torch.tensor(size), key))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    changes, options = CASES[name]
    inputs = make_inputs(**changes)
    (out, report), (expected, truth), chosen, own = triton_and_reference(inputs, make_config(**options))
    for mine, theirs in zip(chosen[:4], own[:4], strict=True):
        assert torch.equal(mine, theirs)
    tolerance = 2e-3 if inputs.q.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(report.tokens_read, truth.tokens_read)
    assert torch.equal(report.dense_fallback, truth.dense_fallback)
    assert torch.equal(report.unbounded_chunks, truth.unbounded_chunks)
    torch.testing.assert_close(report.density, truth.density)
    torch.testing.assert_close(report.half_width, truth.half_width, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("verify", ["output", "denominator"])
def test_finds_the_same_budget(verify):
    inputs = make_inputs()
    options = {
        "epsilon": 0.3,
        "delta": 0.1,
        "sink": 20,
        "window": 20,
        "heavy": 0.1,
        "base_sample": 24,
        "verify": verify,
    }
    arguments = (inputs.q, inputs.k, inputs.v, inputs.lengths)
    options |= {"seed": inputs.seed, "chunk_size": 16, "summaries": inputs.summaries}
    out, report = vattention_decode(*arguments, **options, backend="triton")
    expected, truth = vattention_decode(*arguments, **options, backend="reference")
    assert ((report.tokens_read - truth.tokens_read).abs() <= 1).all()
    if torch.equal(report.tokens_read, truth.tokens_read):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not report.dense_fallback.all()


def test_mean_keys_take_the_place_of_summaries():
    inputs = make_inputs(lengths=(333,))
    options = {"epsilon": 0.3, "delta": 0.1, "sink": 20, "window": 20, "base_sample": 24, "chunk_size": 16}
    arguments = (inputs.q, inputs.k, inputs.v, inputs.lengths)
    out, _ = vattention_decode(*arguments, **options, backend="triton")
    expected, _ = vattention_decode(*arguments, **options, backend="triton", summaries=inputs.summaries)
    torch.testing.assert_close(out, expected)


def test_errors():
    inputs = make_inputs()
    options = {"epsilon": 0.3, "delta": 0.1, "backend": "triton"}
    with pytest.raises(ValueError, match="power of 2, not 48"):
        vattention_decode(inputs.q, inputs.k, inputs.v, inputs.lengths, chunk_size=48, **options)
    with pytest.raises(ValueError, match="float64"):
        doubles = (x.double() for x in (inputs.q, inputs.k, inputs.v))
        vattention_decode(*doubles, inputs.lengths, **options)
