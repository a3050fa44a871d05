"""Calls of dash_decode, and how each of its stages is compared with exact arithmetic on what the stage was given."""

from typing import Any, NamedTuple

import torch
from dash_cases import Case, relative_error
from torch import Tensor

from dash_train.kernels.dash import chunk_summaries
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.decode_attend import attend_lists
from dash_train.kernels.dash.triton.decode_routing import list_chunks, score_chunks
from dash_train.kernels.entmax import entmax15

CLEAR_PBAR = 1e-9  # a chunk with more than this is routed to in every arithmetic


class DecodeCall(NamedTuple):
    """The tensors of dash_decode, and its other arguments."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    summaries: Tensor
    lengths: Tensor
    config: DashConfig

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:5]

    @property
    def options(self) -> dict[str, Any]:
        return self.config._asdict()

    def double(self) -> tuple[Tensor, ...]:
        """The tensors, exact."""
        return (*(tensor.double() for tensor in self[:4]), self.lengths)


def decode_call(case: Case, lengths: list[int], device: str, kv_heads: int = 2) -> DecodeCall:
    """Random tensors; whatever lies beyond a sequence's length is NaN. The cache ends within a chunk."""
    batch, capacity = len(lengths), max(lengths) + 5
    q = torch.randn(batch, case.group * kv_heads, case.head_dim, device=device).to(case.dtype)
    k, v = (torch.randn(batch, capacity, kv_heads, case.head_dim, device=device).to(case.dtype) for _ in "kv")
    w = torch.randn(kv_heads, case.head_dim, device=device).to(case.dtype)
    chunks = -(-capacity // case.chunk_size)
    summaries = torch.full((batch, chunks, kv_heads, case.head_dim), torch.nan, device=device)
    for row, length in enumerate(lengths):
        complete = chunk_summaries(k[row : row + 1], w, chunk_size=case.chunk_size)[0, : length // case.chunk_size]
        summaries[row, : len(complete)] = complete
        k[row, length:], v[row, length:] = torch.nan, torch.nan
    config = DashConfig(case.chunk_size, 8.0, case.normalizer, 1.5)
    return DecodeCall(q, k, v, summaries, torch.tensor(lengths, dtype=torch.int32, device=device), config)


def check_stages(call: DecodeCall, score_tolerance: float, out_tolerance: float) -> None:
    """Scores, lists and attention, each on what the stage before it made: no chunk on the edge can disturb."""
    z = score_chunks(call.q, call.summaries, call.lengths, call.config)
    lists = list_chunks(z, call.lengths, call.config)
    out = attend_lists(call.q, call.k_cache, call.v_cache, lists, call.config)
    for row, length in enumerate(call.lengths.tolist()):
        if length == 0:
            assert not lists.keys[row].any() and not out[row].any()
            continue
        for kv_head in range(call.k_cache.shape[2]):
            heads = slice(kv_head * z.shape[2], (kv_head + 1) * z.shape[2])
            q = call.q[row, heads].double()
            eligible = (length - 1) // call.config.chunk_size
            scores = z[row, kv_head, :, :eligible]
            if eligible:
                summaries = call.summaries[row, :eligible, kv_head].double()
                factor = 0.5 * call.config.routing_scale * q.shape[1] ** -0.5
                error = (scores - q @ summaries.T * factor).abs().max()
                assert error < score_tolerance * factor * q.norm(dim=1).max() * summaries.norm(dim=1).max()
            chunks, prior = _checked_list(call, lists, row, kv_head, scores)
            assert relative_error(out[row, heads], _attend(call, q, row, kv_head, chunks, prior)) < out_tolerance


def _checked_list(call: DecodeCall, lists: ChunkLists, row: int, kv_head: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """The chunks of one list and their log-prior, after a comparison with the exact entmax of its scores."""
    size, length, eligible = call.config.chunk_size, int(call.lengths[row]), z.shape[1]
    entries = -(-int(lists.keys[row, kv_head]) // size)
    chunks = lists.chunks[row, kv_head, :entries].long()
    log_pbar = lists.log_pbar[row, kv_head, :entries].double()
    normalizer = lists.normalizer[row, kv_head].double()
    assert chunks[-1] == eligible and (chunks.diff() > 0).all()
    assert lists.keys[row, kv_head] == (entries - 1) * size + length - eligible * size

    if eligible:
        routed = log_pbar[:-1]
        pbar = entmax15(2 * z.double()).mean(0)
        listed = torch.zeros_like(pbar, dtype=torch.bool)
        listed[chunks[:-1]] = True
        assert listed[pbar > CLEAR_PBAR].all()
        assert abs(routed.exp().sum() - 1) < 3e-6
        error = (routed.exp() - pbar[chunks[:-1]]).abs()
        assert (error < 1e-6 + 1e-3 * pbar[chunks[:-1]]).all()
        wanted = {"geometric_mean": routed.mean(), "peak": routed.max(), "none": routed.new_zeros(())}
        torch.testing.assert_close(normalizer, wanted[call.config.prior_normalizer], rtol=1e-5, atol=1e-5)
    temperature = 1.0 if call.config.prior_normalizer == "none" else call.config.prior_temperature
    prior = (log_pbar - normalizer) / temperature
    assert prior[-1] == 0
    return chunks, prior


def _attend(call: DecodeCall, q: Tensor, row: int, kv_head: int, chunks: Tensor, prior: Tensor) -> Tensor:
    """Stage 2 of one group, exact."""
    size = call.config.chunk_size
    tokens = (chunks[:, None] * size + torch.arange(size, device=q.device)).flatten()
    seen = tokens < call.lengths[row]
    tokens, bias = tokens[seen], prior.repeat_interleave(size)[seen]
    k, v = (cache[row, tokens, kv_head].double() for cache in (call.k_cache, call.v_cache))
    return (q @ k.T * q.shape[1] ** -0.5 + bias).softmax(-1) @ v
