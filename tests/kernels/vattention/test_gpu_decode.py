"""vAttention in Triton on a GPU: pytest -m gpu tests/kernels/vattention"""

import pytest
import torch
from vattention_cases import exact_attention, make_config, make_inputs, triton_and_reference

from dash_train.kernels.vattention import vattention_decode

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("verify", ["output", "denominator"])
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.bfloat16, 4, 128),
        (torch.bfloat16, 16, 128),
        (torch.bfloat16, 1, 64),
        (torch.bfloat16, 7, 96),
        (torch.float16, 3, 256),
        (torch.float32, 8, 64),
        (torch.float32, 2, 256),
    ],
)
def test_equals_the_reference(dtype, group, head_dim, verify, prior, bounds):
    """Ragged rows, some shorter than the sink."""
    shape = {"lengths": (20_000, 1, 70, 8191, 12_345), "capacity": 20_000, "chunk_size": 64, "kv_heads": 2}
    inputs = make_inputs(
        **shape, group=group, head_dim=head_dim, dtype=dtype, prior=prior, bounds=bounds, device="cuda"
    )
    options = {"sink": 128, "window": 128, "heavy": 0.05, "base_sample": 512, "chunk_size": 64, "epsilon": 0.1}
    (out, report), (expected, truth), chosen, _ = triton_and_reference(inputs, make_config(verify=verify, **options))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert torch.equal(report.tokens_read, truth.tokens_read)
    assert torch.equal(report.dense_fallback, truth.dense_fallback)
    torch.testing.assert_close(report.half_width, truth.half_width, rtol=0.05, atol=1e-3)
    exists = torch.arange(313, device="cuda") * 64 < inputs.lengths[:, None, None]
    if prior:
        exists = exists & (inputs.chunk_bias > -torch.inf)
    assert torch.equal(chosen.certain | chosen.residual | chosen.dropped, exists.expand_as(chosen.certain))


def test_finds_the_same_chunks_and_budget_in_fp32():
    inputs = make_inputs(lengths=(20_000, 9_000), capacity=20_000, chunk_size=64, group=4, device="cuda")
    arguments = (inputs.q, inputs.k, inputs.v, inputs.lengths)
    options = {"epsilon": 0.1, "delta": 0.05, "seed": inputs.seed, "summaries": inputs.summaries}
    _, report = vattention_decode(*arguments, **options, backend="triton")
    _, truth = vattention_decode(*arguments, **options, backend="reference")
    assert ((report.tokens_read - truth.tokens_read).abs() <= 2).all()
    torch.testing.assert_close(report.half_width, truth.half_width, rtol=1e-2, atol=1e-4)


def test_reading_everything_equals_exact_attention():
    inputs = make_inputs(lengths=(5_000, 3_333), capacity=5_000, chunk_size=64, prior=True, device="cuda")
    options = {"epsilon": 0.05, "delta": 0.05, "max_sample": 0.0, "chunk_bias": inputs.chunk_bias}
    out, report = vattention_decode(inputs.q, inputs.k, inputs.v, inputs.lengths, **options)
    torch.testing.assert_close(out.double(), exact_attention(inputs, 64), rtol=1e-5, atol=1e-5)
    assert report.dense_fallback.all() and (report.half_width == 0).all()


def test_graph_replay_equals_eager():
    """Lengths, seeds and queries change between replays; the host waits in neither."""
    inputs = make_inputs(lengths=(20_000, 9_000), capacity=20_000, chunk_size=64, dtype=torch.bfloat16, device="cuda")
    k, v = (x.nan_to_num(0.5) for x in (inputs.k, inputs.v))
    summaries = inputs.summaries.nan_to_num(0.5)
    q, lengths, seed = inputs.q.clone(), inputs.lengths.clone(), inputs.seed.clone()

    def step():
        options = {"epsilon": 0.1, "delta": 0.05, "seed": seed, "summaries": summaries}
        return vattention_decode(q, k, v, lengths, **options)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, report = step()
    for change in range(3):
        q.add_(0.1 * change)
        lengths.sub_(777 * change)
        seed.add_(change)
        graph.replay()
        expected, truth = step()
        assert torch.equal(out, expected)
        for name in report._fields[:5]:
            assert torch.equal(getattr(report, name), getattr(truth, name)), name


def test_rows_do_not_depend_on_the_batch():
    inputs = make_inputs(lengths=(20_000, 9_000, 300), capacity=20_000, chunk_size=64, device="cuda")
    options = {"epsilon": 0.1, "delta": 0.05}
    out, report = vattention_decode(*inputs[:4], seed=inputs.seed, summaries=inputs.summaries, **options)
    for row in range(3):
        q, k, v, lengths, summaries = (x[row : row + 1] for x in inputs[:5])
        alone, alone_report = vattention_decode(
            q, k, v, lengths, seed=inputs.seed[row : row + 1], summaries=summaries, **options
        )
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_report.tokens_read[0], report.tokens_read[row])


@pytest.mark.alone
def test_more_than_2_to_the_31_elements():
    """The last of many rows equals that row alone."""
    batch, capacity, kv_heads, head_dim = 5, 524_288, 8, 128
    generator = torch.Generator("cuda").manual_seed(0)
    k, v = (torch.empty(batch, capacity, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    k.normal_(generator=generator), v.normal_(1, generator=generator)
    assert k.numel() > 2**31
    q = torch.randn(batch, 32, head_dim, device="cuda", dtype=torch.bfloat16)
    summaries = k.view(batch, -1, 64, kv_heads, head_dim).mean(2, dtype=torch.float32)
    lengths = torch.full((batch,), capacity, device="cuda", dtype=torch.int32)
    options = {"epsilon": 0.05, "delta": 0.05}
    out, report = vattention_decode(q, k, v, lengths, summaries=summaries, **options)
    last = [x[-1:].clone() for x in (q, k, v, lengths)]
    alone, alone_report = vattention_decode(*last, summaries=summaries[-1:].clone(), **options)
    assert torch.equal(out[-1:], alone)
    assert torch.equal(report.tokens_read[-1:], alone_report.tokens_read)
    exact = torch.nn.functional.scaled_dot_product_attention(
        last[0][:, :, None], last[1].transpose(1, 2), last[2].transpose(1, 2), enable_gqa=True
    )[:, :, 0]
    error = (alone - exact).float().norm(dim=-1) / exact.float().norm(dim=-1)
    assert error.max() < 0.06
    assert report.density.max() < 0.15
