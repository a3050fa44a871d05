"""What decoding adds to a layer's cache: one token a sequence, and what routing needs of prompts."""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import stride_obstacle, use_triton
from dash_train.kernels.common.checks import check_caches, check_per_chunk, check_same_kind, check_shape
from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.dash.checks import check_block, check_numbers, triton_obstacle
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.decode import route_newest, update_summaries
from dash_train.kernels.dash.routing_state import RoutingState, check_state


@torch.no_grad()
def append_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    summaries: Tensor | None = None,
    chunk_query: Tensor | None = None,
    state: RoutingState | None = None,
    chunk_size: int = 64,
    routing_block: int = 1,
    backend: str = "auto",
) -> None:
    """Adds the newest token of each sequence to a cache, in place, without host sync. The step before dash_decode.

    Args:
        q: [batch, heads, head_dim], after RoPE; looked at for `state` only.
        k, v: [batch, kv_heads, head_dim], stored at lengths - 1.
        k_cache, v_cache: [batch, capacity, kv_heads, head_dim].
        lengths: [batch] int32, the new token included; a sequence of length 0 is left alone.
        summaries, chunk_query: as in update_summaries, which is then done too.
        state: the routing state, which gets the query and, where the token begins a routing block, the router's query.
        chunk_size: tokens per chunk.
        routing_block: tokens of a routing block, as in dash_decode.
        backend: as in dash_decode.

    Raises: ValueError naming the argument, its shape and what was expected.
    """
    check_caches(q, k_cache, v_cache, lengths)
    batch, capacity, kv_heads, head_dim = k_cache.shape
    for name, new in (("k", k), ("v", v)):
        check_shape(name, new, batch=batch, kv_heads=kv_heads, head_dim=head_dim)
        check_same_kind(name, new, q)
    if summaries is not None:
        check_per_chunk("summaries", summaries, k_cache, chunk_size)
        if chunk_query is None:
            raise ValueError("chunk_query is None, expected the query of the summaries")
        check_shape("chunk_query", chunk_query, kv_heads=kv_heads, head_dim=head_dim)
    check_block(routing_block, chunk_size)
    check_state(state, q, kv_heads, -(-capacity // chunk_size), routing_block)
    obstacle = triton_obstacle(q, chunk_size) or stride_obstacle((q, k, v, k_cache, v_cache, summaries))
    if use_triton("append_token", backend, q, obstacle):
        from dash_train.kernels.dash.triton.decode_append import append_newest

        kept = None if state is None else (state.recent_q, state.router_q)
        cache = (k_cache, v_cache, summaries)
        append_newest(q, k, v, *cache, lengths.contiguous(), chunk_query, kept, chunk_size, routing_block)
        return
    _store(k, k_cache, lengths - 1, lengths)
    _store(v, v_cache, lengths - 1, lengths)
    if summaries is not None and chunk_query is not None:
        update_summaries(k_cache, summaries, lengths, chunk_query, chunk_size=chunk_size, backend="reference")
    if state is not None:
        _keep_query(q, lengths, state, routing_block)


def _keep_query(q: Tensor, lengths: Tensor, state: RoutingState, routing_block: int) -> None:
    _store(q, state.recent_q, (lengths - 1) % state.recent_q.shape[1], lengths)
    begins = (lengths > 0) & ((lengths - 1) % routing_block == 0)
    mean = _mean_of_recent(state.recent_q, lengths)
    state.router_q.copy_(torch.where(begins[:, None, None], mean, state.router_q))


def _store(new: Tensor, cache: Tensor, places: Tensor, lengths: Tensor) -> None:
    """Row b of `new` becomes cache[b, places[b]], but for a sequence of length 0."""
    row, place = torch.arange(len(new), device=new.device), places.long().clamp(min=0)
    cache[row, place] = torch.where((lengths > 0)[:, None, None], new, cache[row, place])


def _mean_of_recent(recent_q: Tensor, lengths: Tensor) -> Tensor:
    """The router's query at each newest token, summed from it back as router_queries does."""
    row, window = torch.arange(len(lengths), device=lengths.device), recent_q.shape[1]
    total = torch.zeros((), device=recent_q.device, dtype=compute_dtype(recent_q.dtype))
    for back in range(window):
        before = recent_q[row, (lengths.long() - 1 - back) % window]
        total = total + before.to(total.dtype).masked_fill((back >= lengths)[:, None, None], 0)
    return (total / lengths.clamp(min=1, max=window)[:, None, None]).to(recent_q.dtype)


@torch.no_grad()
def append_prompts(
    q: Tensor,
    router_q: Tensor,
    start: int,
    lengths: Tensor,
    summaries: Tensor,
    state: RoutingState,
    *,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    routing_block: int = 1,
    backend: str = "auto",
) -> None:
    """What a piece of prompts leaves in the routing state, in place: sequences that end in it can be decoded.

    A sequence that ends within a routing block gets the block's list.

    Args:
        q: [batch, piece, heads, head_dim], after RoPE, at the positions from `start` on, a multiple of chunk_size.
        router_q: [batch, ceil(piece / routing_block), heads, head_dim], the piece's routers' queries.
        start: where the piece begins. The pieces before have been appended.
        lengths: [batch] int32, of the whole prompts, which may end in any piece.
        summaries: [batch, chunks, kv_heads, head_dim] float32, of the complete chunks up to this piece's.
        state: changed in place.
        chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block, backend: as in dash_decode.
    """
    check_numbers(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    check_block(routing_block, chunk_size)
    check_state(state, q[:, 0], summaries.shape[2], summaries.shape[1], routing_block)
    obstacle = triton_obstacle(q, chunk_size) or stride_obstacle((q, summaries))
    on_triton = use_triton("append_prompts", backend, q, obstacle)
    state.keep_queries(q, router_q, start, lengths, routing_block)
    # All sequences route, whatever the token of their block: those that go on get a list that will be written again.
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    route_newest(q[:, 0], summaries, lengths, config, state, on_triton)
