"""Decoding with routing blocks: token by token, in sequences that are in different places of their blocks."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_train.kernels.dash import (
    RoutingState,
    append_prompts,
    append_token,
    chunk_summaries,
    dash_attention,
    dash_decode,
    decode_prior,
    router_queries,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, CAPACITY, HEADS, KV_HEADS, HEAD_DIM = 16, 76, 6, 2, 16  # the cache ends within a chunk
CHUNKS = -(-CAPACITY // CHUNK)
OPTIONS = {"chunk_size": CHUNK, "routing_scale": 4.0, "prior_normalizer": "peak", "prior_temperature": 1.5}
BACKENDS = ["reference", "triton"]


class Decoder:
    """Tokens of `batch` sequences, and a cache of what they have been decoded to; what is not written is NaN."""

    def __init__(self, block: int, window: int, backend: str, batch: int = 3) -> None:
        self.q = torch.randn(batch, CAPACITY, HEADS, HEAD_DIM, device=DEVICE)
        self.k, self.v = torch.randn(2, batch, CAPACITY, KV_HEADS, HEAD_DIM, device=DEVICE)
        self.chunk_query = torch.randn(KV_HEADS, HEAD_DIM, device=DEVICE)
        self.keys, self.values = torch.full_like(self.k, torch.nan), torch.full_like(self.v, torch.nan)
        self.summaries = torch.full((batch, CHUNKS, KV_HEADS, HEAD_DIM), torch.nan, device=DEVICE)
        sizes = (batch, CHUNKS, HEADS, KV_HEADS, HEAD_DIM, window)
        self.state = RoutingState.allocate(*sizes, torch.float32, self.q.device)
        self.block, self.window = block, window
        self.options: dict[str, Any] = {**OPTIONS, "routing_block": block, "state": self.state, "backend": backend}

    def append(self, lengths: list[int]) -> Tensor:
        """The tokens that give these lengths join the cache: their queries [batch, heads, head_dim]."""
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        row, newest = torch.arange(len(lengths), device=DEVICE), (self.lengths.long() - 1).clamp(min=0)
        q, k, v = (tensor[row, newest] for tensor in (self.q, self.k, self.v))
        append_token(
            q,
            k,
            v,
            self.keys,
            self.values,
            self.lengths,
            summaries=self.summaries,
            chunk_query=self.chunk_query,
            state=self.state,
            chunk_size=CHUNK,
            routing_block=self.block,
            backend=self.options["backend"],
        )
        return q

    def step(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Output and active chunks of one token a sequence."""
        q = self.append(lengths)
        caches = (self.keys, self.values, self.summaries, self.lengths)
        return dash_decode(q, *caches, return_active=True, **self.options)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Output [batch, CAPACITY, heads, head_dim] and active chunks [batch, kv_heads, CAPACITY] of dash_attention."""
        router_q = router_queries(self.q, block=self.block, window=self.window)
        tensors = (self.q, self.k, self.v, self.chunk_query)
        blocks = {"routing_block": self.block, "router_q": router_q, "backend": "reference"}
        out, stats = dash_attention(*tensors, **OPTIONS, **blocks, return_stats=True)
        return out, stats.active_chunks


def assert_step(decoder: Decoder, lengths: list[int], expected: tuple[Tensor, Tensor]) -> None:
    out, active = decoder.step(lengths)
    for row, length in enumerate(lengths):
        wanted = expected[0][row, length - 1] if length else torch.zeros_like(out[row])
        torch.testing.assert_close(out[row], wanted, rtol=1e-4, atol=1e-5)
        if length:
            assert torch.equal(active[row], expected[1][row, :, length - 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "window"), [(1, 4), (2, 1), (4, 3), (16, 16), (8, 20)])
def test_every_step_equals_the_row_of_dash_attention(block: int, window: int, backend: str) -> None:
    """Sequences that begin 9 and 13 tokens after the first. Triton's interpreter does the last steps only: in them
    each has a block that begins or goes on, the second a new chunk."""
    decoder = Decoder(block, window, "reference")
    expected = decoder.expected()
    for length in range(1, CAPACITY + 1):
        if DEVICE == "cuda" or length > CAPACITY - 4:
            decoder.options["backend"] = backend
        assert_step(decoder, [length, max(0, length - 9), max(0, length - 13)], expected)


@pytest.mark.parametrize(
    ("block", "window", "piece", "backend"),
    [(*case, "reference") for case in product((1, 4, 16), (3, 40), (16, 80))]
    + [(4, 3, 32, "triton"), (16, 40, 16, "triton")],
)
def test_steps_go_on_where_prompts_end(block: int, window: int, piece: int, backend: str) -> None:
    """Prompts that end at and within chunks and blocks, in different pieces; what follows them is padding."""
    decoder = Decoder(block, window, backend, batch=5)
    expected, prompts = decoder.expected(), [1, 16, 35, 50, 70]
    lengths = torch.tensor(prompts, dtype=torch.int32, device=DEVICE)
    padded = decoder.q.masked_fill((torch.arange(CAPACITY, device=DEVICE) >= lengths[:, None])[..., None, None], 9.0)
    decoder.keys.copy_(decoder.k)
    decoder.values.copy_(decoder.v)
    decoder.summaries.copy_(torch.nan_to_num(decoder.summaries))
    options = {name: value for name, value in decoder.options.items() if name != "state"}
    for start in range(0, 70, piece):
        q = padded[:, start : min(start + piece, 70)]
        summaries = chunk_summaries(decoder.k[:, start : start + q.shape[1]], decoder.chunk_query, chunk_size=CHUNK)
        decoder.summaries[:, start // CHUNK : start // CHUNK + summaries.shape[1]] = summaries
        router_q = router_queries(q, None, (start,), block, window, decoder.state.queries_before(start))
        append_prompts(q, router_q, start, lengths, decoder.summaries, decoder.state, **options)
    for more in range(1, 4):
        assert_step(decoder, [length + more for length in prompts], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_is_kept_until_the_next_block(backend: str) -> None:
    """Other queries change nothing in it but the keys of the own chunk; the next block's first token does."""
    decoder = Decoder(8, 4, "reference")
    for length in range(1, 66):
        decoder.step([length] * 3)
    decoder.options["backend"] = backend
    first = [tensor.clone() for tensor in decoder.state.lists]
    for length in (66, 67, 71, 73):
        decoder.q[:, length - 1] *= -3
        decoder.step([length] * 3)
        now = [*decoder.state.lists]
        assert torch.equal(now.pop(2), first[2] + length - 65) or length == 73
        is_kept = [torch.equal(*pair) for pair in zip(now, first[:2] + first[3:], strict=True)]
        assert all(is_kept) if length < 73 else not any(is_kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_prior_is_that_of_the_kept_list(backend: str) -> None:
    decoder = Decoder(8, 8, "reference")
    for length in range(1, 53):
        q = decoder.append([length] * 3)
        if length >= 49:
            decoder.options["backend"] = backend
            prior = decode_prior(q, decoder.summaries, decoder.lengths, **decoder.options)
            router_q = router_queries(decoder.q, block=8, window=8)[:, 48 // 8]
            expected = decode_prior(router_q, decoder.summaries, decoder.lengths, **OPTIONS, backend="reference")
            torch.testing.assert_close(prior, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_token_need_no_state() -> None:
    """With a window of 1 the state changes no bit."""
    decoder = Decoder(1, 1, "auto")
    for length in range(1, 40):
        with_state, active = decoder.step([length, max(0, length - 5), 1])
        q = decoder.q[torch.arange(3), (decoder.lengths.long() - 1).clamp(min=0)]
        caches = (decoder.keys, decoder.values, decoder.summaries, decoder.lengths)
        out, active_without = dash_decode(q, *caches, **OPTIONS, return_active=True)
        assert torch.equal(with_state, out) and torch.equal(active, active_without)


def test_a_sequence_may_take_anothers_place() -> None:
    """As in beam search."""
    decoder = Decoder(8, 4, "auto")
    expected = decoder.expected()
    for length in range(1, 44):
        assert_step(decoder, [length, max(0, length - 3), max(0, length - 6)], expected)
    rows = torch.tensor([2, 2, 0], device=DEVICE)
    for tensor in (decoder.keys, decoder.values, decoder.summaries, *decoder.state.tensors()):
        tensor.copy_(tensor[rows])
    for name in ("q", "k", "v"):
        setattr(decoder, name, getattr(decoder, name)[rows])
    for more in range(1, 10):
        assert_step(decoder, [37 + more, 37 + more, 43 + more], tuple(tensor[rows] for tensor in expected))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("state is None, expected a RoutingState", {"state": None}),
        (r"state.recent_q has shape .*expected \[batch=3, window=4, heads=6", {"q": torch.zeros(3, 12, HEAD_DIM)}),
        (r"routing_block is 3, expected a power of two", {"routing_block": 3}),
        (r"routing_block is 32, expected a power of two", {"routing_block": 32}),
    ],
)
def test_errors_name_the_argument(message: str, changes: dict) -> None:
    decoder = Decoder(8, 4, "auto")
    arguments = {"q": decoder.q[:, 0], "summaries": decoder.summaries, "lengths": torch.ones(3, dtype=torch.int32)}
    message = message.replace("heads=6", "heads=12") if "q" in changes else message
    with pytest.raises(ValueError, match=message):
        decode_prior(**{**arguments, **decoder.options, **changes})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"k has shape \[3, 1, 16\]", {"k": torch.zeros(3, 1, HEAD_DIM)}),
        (r"v_cache has shape", {"v_cache": torch.zeros(3, 5, KV_HEADS, HEAD_DIM)}),
        ("v is torch.float64", {"v": torch.zeros(3, KV_HEADS, HEAD_DIM).double()}),
        ("chunk_query is None", {"summaries": torch.zeros(3, CHUNKS, KV_HEADS, HEAD_DIM)}),
        ("state is None", {"routing_block": 4}),
    ],
)
def test_append_names_the_argument(message: str, changes: dict) -> None:
    new, cache = torch.zeros(3, KV_HEADS, HEAD_DIM), torch.zeros(3, CAPACITY, KV_HEADS, HEAD_DIM)
    arguments = {"q": torch.zeros(3, HEADS, HEAD_DIM), "k": new, "v": new, "k_cache": cache, "v_cache": cache}
    arguments |= {"lengths": torch.ones(3, dtype=torch.int32), "chunk_size": CHUNK}
    with pytest.raises(ValueError, match=message):
        append_token(**{**arguments, **changes})
