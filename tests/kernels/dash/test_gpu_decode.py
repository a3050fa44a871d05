"""The Triton kernels of decoding on a GPU: pytest -m gpu tests/kernels"""

import pytest
import torch
from dash_cases import TOLERANCE, Case, covering_array, relative_error
from decode_cases import DecodeCall, check_stages, decode_call

from dash_train.kernels.dash import (
    RoutingState,
    append_prompts,
    append_token,
    chunk_summaries,
    dash_decode,
    router_queries,
    update_summaries,
)
from dash_train.kernels.dash.config import DashConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# Without documents and rows of different lengths: every call has those.
CASES = sorted({case._replace(documents=False, ragged=True) for case in covering_array()}, key=str)
SCORE_TOLERANCE = {torch.bfloat16: 1e-5, torch.float16: 2e-6, torch.float32: 2e-6}


def call_of(case: Case) -> DecodeCall:
    size = case.chunk_size
    return decode_call(case, [0, 1, size, size + 1, 64 * size, 99 * size - 3, 300 * size + 7], "cuda")


def decode(call: DecodeCall) -> torch.Tensor:
    return dash_decode(*call.tensors, **call.options, backend="triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_is_exact(case):
    check_stages(call_of(case), SCORE_TOLERANCE[case.dtype], TOLERANCE[case.dtype])


@pytest.mark.parametrize("group", [1, 4, 16])
def test_equals_the_reference(group):
    """With "peak" a chunk on the edge of the support changes nothing."""
    call = call_of(Case(dtype=torch.bfloat16, head_dim=128, group=group, chunk_size=64, normalizer="peak"))
    expected = dash_decode(*call.double(), **call.options, backend="reference")
    assert relative_error(decode(call), expected) < TOLERANCE[torch.bfloat16]


def test_long_histories_of_different_lengths():
    """8,192 chunks: the scores of a group are several steps of the list kernel; next to it sequences of a few."""
    case = Case(dtype=torch.bfloat16, head_dim=128, group=4, chunk_size=16)
    call = decode_call(case, [8192 * 16, 100, 0, 5000 * 16 + 9], "cuda")
    check_stages(call, SCORE_TOLERANCE[case.dtype], TOLERANCE[case.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_update_equals_the_reference(dtype):
    call = call_of(Case(dtype=dtype, head_dim=128, group=4, chunk_size=64))
    w = torch.randn(2, 128, device="cuda").to(dtype)
    updated = {}
    for backend in ("triton", "reference"):
        updated[backend] = torch.full_like(call.summaries, 7.0)
        update_summaries(call.k_cache, updated[backend], call.lengths, w, backend=backend)
    torch.testing.assert_close(updated["triton"], updated["reference"], rtol=1e-4, atol=1e-5)


def test_a_graph_replays_what_eager_gives_at_every_length():
    """Bit for bit; the lengths change between replays, also across a chunk's end, and grow tenfold."""
    call = decode_call(Case(dtype=torch.bfloat16, head_dim=128, group=4, chunk_size=64), [7000, 6900, 6400], "cuda")
    w = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)
    steps = [[640, 0, 63], [641, 1, 64], [6999, 6900, 65], [7000, 640, 6400]]
    before = call.summaries.clone()
    eager = []
    for lengths in steps:
        call.lengths.copy_(torch.tensor(lengths))
        update_summaries(call.k_cache, call.summaries, call.lengths, w)
        eager.append(decode(call))
    after = call.summaries.clone()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_summaries(call.k_cache, call.summaries, call.lengths, w)
        out = decode(call)
    call.summaries.copy_(before)
    for lengths, expected in zip(steps, eager, strict=True):
        call.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, expected)
    torch.testing.assert_close(call.summaries, after, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("block", "window"), [(1, 16), (16, 16), (64, 64), (16, 100)])
def test_a_graph_of_routing_blocks_gives_what_the_reference_gives(block, window):
    """And bit for bit what eager steps give; sequences in different places of their blocks, over borders of chunks."""
    decoders = [BlocksDecoder(block, window, [6390, 700, 5]) for _ in range(3)]
    decoders[2].options["backend"] = "reference"
    graph = torch.cuda.CUDAGraph()
    for step in range(140):
        eager, replayed, expected = decoders
        if step == 1:  # the first eager step has compiled what is captured
            with torch.cuda.graph(graph):
                replayed.out = replayed.decode()
        for decoder in decoders:
            decoder.next_token(step)
        eager.out, expected.out = eager.decode(), expected.decode()
        if step:
            graph.replay()
        else:
            replayed.out = replayed.decode()
        assert torch.equal(replayed.out, eager.out)
        assert relative_error(eager.out, expected.out) < TOLERANCE[torch.bfloat16]
    for kept, other in zip(eager.state.tensors(), replayed.state.tensors(), strict=True):
        assert torch.equal(kept, other)


class BlocksDecoder:
    """A cache that holds random prompts, always the same, and steps over it with random tokens."""

    def __init__(self, block: int, window: int, prompts: list[int]) -> None:
        self.generator = torch.Generator("cuda").manual_seed(0)
        batch, longest, capacity = len(prompts), max(prompts), max(prompts) + 150
        chunks = -(-capacity // 64)
        self.lengths = torch.tensor(prompts, dtype=torch.int32, device="cuda")
        self.keys, self.values = self.normal(2, batch, capacity, 2, 128)
        self.chunk_query = self.normal(2, 128)
        self.summaries = torch.zeros(batch, chunks, 2, 128, device="cuda")
        self.summaries[:, : capacity // 64] = chunk_summaries(self.keys, self.chunk_query)
        self.state = RoutingState.allocate(batch, chunks, 8, 2, 128, window, torch.bfloat16, self.keys.device)
        self.options = {"routing_scale": 8.0, "prior_normalizer": "peak", "routing_block": block, "backend": "triton"}
        q = self.normal(batch, longest, 8, 128)
        router_q = router_queries(q, block=block, window=window)
        append_prompts(q, router_q, 0, self.lengths, self.summaries, self.state, **self.options)
        self.q, self.k, self.v = (self.normal(batch, heads, 128) for heads in (8, 2, 2))

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device="cuda").bfloat16()

    def next_token(self, step: int) -> None:
        self.generator.manual_seed(step + 1)
        for tensor in (self.q, self.k, self.v):
            tensor.copy_(self.normal(*tensor.shape))

    def decode(self) -> torch.Tensor:
        self.lengths += 1
        caches = (self.keys, self.values)
        new = {"summaries": self.summaries, "chunk_query": self.chunk_query, "state": self.state}
        kept = {"routing_block": self.options["routing_block"], "backend": self.options["backend"]}
        append_token(self.q, self.k, self.v, *caches, self.lengths, **new, **kept)
        return dash_decode(self.q, *caches, self.summaries, self.lengths, state=self.state, **self.options)


def test_two_runs_are_equal():
    call = call_of(Case(dtype=torch.bfloat16, head_dim=128, group=4, chunk_size=64))
    assert torch.equal(decode(call), decode(call))


def test_the_host_never_waits():
    call = call_of(Case(dtype=torch.bfloat16, head_dim=128, group=4, chunk_size=64))
    w = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)
    for mode in ("default", "error"):  # first compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            update_summaries(call.k_cache, call.summaries, call.lengths, w)
            decode(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.alone
def test_more_than_2_to_the_32_elements():
    """8 sequences of 512K tokens and 8 KV heads: the last one equals that sequence alone."""
    size = (8, 2**19, 8, 128)
    torch.use_deterministic_algorithms(False)  # filling so much memory with NaN takes its time
    q = torch.randn(8, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    summaries = torch.randn(8, 2**13, 8, 128, device="cuda") / 2
    lengths = torch.full((8,), 2**19, dtype=torch.int32, device="cuda")
    call = DecodeCall(q, k, v, summaries, lengths, DashConfig(64, 8.0, "geometric_mean", 1.0))
    alone = DecodeCall(*(tensor[7:] for tensor in call.tensors), call.config)
    out = decode(call)
    assert relative_error(out[7:], decode(alone)) < 5e-3  # its lists are cut elsewhere
    check_stages(alone, SCORE_TOLERANCE[torch.bfloat16], TOLERANCE[torch.bfloat16])

    w = torch.zeros(8, 128, device="cuda", dtype=torch.bfloat16)
    update_summaries(k, summaries, lengths, w)
    torch.testing.assert_close(summaries[7, -1], k[7, -64:].float().mean(0), rtol=1e-4, atol=1e-5)
