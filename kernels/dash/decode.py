"""One-token decoding over a KV cache: the cache of chunk summaries, and attention of the newest token."""

from typing import Literal, overload

import torch
from torch import Tensor

from dash_train.kernels.common.backend import stride_obstacle, use_triton
from dash_train.kernels.common.checks import check_caches, check_dimensions, check_per_chunk, check_shape
from dash_train.kernels.dash.checks import check_block, check_numbers, triton_obstacle
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference import decode as decode_reference
from dash_train.kernels.dash.reference.stages import summarize, whole_chunks
from dash_train.kernels.dash.routing_state import RoutingState, check_state


def chunk_summaries(k: Tensor, chunk_query: Tensor, *, chunk_size: int = 64) -> Tensor:
    """The summaries of the complete chunks of `k`, as a prefill stores them.

    Args:
        k: [batch, seq, kv_heads, head_dim], after RoPE; seq need not be a multiple of chunk_size.
        chunk_query: [kv_heads, head_dim].
        chunk_size: tokens per chunk.

    Returns: [batch, seq // chunk_size, kv_heads, head_dim] float32 (float64 for float64 keys).
    """
    check_dimensions("k", k, "batch", "seq", "kv_heads", "head_dim")
    check_shape("chunk_query", chunk_query, kv_heads=k.shape[2], head_dim=k.shape[3])
    complete = k.shape[1] // chunk_size
    return summarize(whole_chunks(k, chunk_size), chunk_query, chunk_size)[:, :, :complete].transpose(1, 2)


@torch.no_grad()
def update_summaries(
    k_cache: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = 64,
    backend: str = "auto",
) -> None:
    """After a new key is written: stores the summary of the chunk that it completed, if it did. No host sync.

    Args:
        k_cache: [batch, capacity, kv_heads, head_dim], the new key of each sequence at lengths - 1.
        summaries: [batch, ceil(capacity / chunk_size), kv_heads, head_dim] float32, changed in place.
        lengths: [batch] int32, the new token included; a sequence of length 0 is left alone.
        chunk_query: [kv_heads, head_dim].
        chunk_size: tokens per chunk.
        backend: as in dash_decode.

    Raises: ValueError naming the argument, its shape and what was expected.
    """
    check_dimensions("k_cache", k_cache, "batch", "capacity", "kv_heads", "head_dim")
    check_per_chunk("summaries", summaries, k_cache, chunk_size)
    check_shape("lengths", lengths, batch=k_cache.shape[0])
    check_shape("chunk_query", chunk_query, kv_heads=k_cache.shape[2], head_dim=k_cache.shape[3])
    obstacle = triton_obstacle(k_cache, chunk_size) or stride_obstacle((k_cache, summaries))
    if use_triton("update_summaries", backend, k_cache, obstacle):
        from dash_train.kernels.dash.triton.summaries import update_chunk_summaries

        return update_chunk_summaries(k_cache, summaries, lengths.contiguous(), chunk_query, chunk_size)
    sequence = torch.arange(k_cache.shape[0], device=k_cache.device)
    chunk = (lengths.long() - 1).clamp(min=0) // chunk_size
    tokens = chunk[:, None] * chunk_size + torch.arange(chunk_size, device=k_cache.device)
    # In an incomplete chunk at the end of the cache some tokens do not exist; its summary is not kept.
    keys = k_cache[sequence[:, None], tokens.clamp(max=k_cache.shape[1] - 1)]
    new = summarize(whole_chunks(keys, chunk_size), chunk_query, chunk_size)[:, :, 0]
    completed = ((lengths > 0) & (lengths % chunk_size == 0))[:, None, None]
    summaries[sequence, chunk] = torch.where(completed, new.to(summaries.dtype), summaries[sequence, chunk])


@overload
def dash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    *,
    chunk_size: int = ...,
    routing_scale: float = ...,
    prior_normalizer: str = ...,
    prior_temperature: float = ...,
    routing_block: int = ...,
    state: RoutingState | None = ...,
    backend: str = ...,
    return_active: Literal[False] = ...,
) -> Tensor: ...


@overload
def dash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    *,
    chunk_size: int = ...,
    routing_scale: float = ...,
    prior_normalizer: str = ...,
    prior_temperature: float = ...,
    routing_block: int = ...,
    state: RoutingState | None = ...,
    backend: str = ...,
    return_active: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def dash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    *,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    routing_block: int = 1,
    state: RoutingState | None = None,
    backend: str = "auto",
    return_active: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """DashAttention of the newest token of each sequence: the last row of dash_attention over the first `lengths` keys.

    Args:
        q: [batch, heads, head_dim], after RoPE, standing at position lengths - 1. Its own chunk is
            (lengths - 1) // chunk_size, even when it completes it.
        k_cache, v_cache: [batch, capacity, kv_heads, head_dim]; what lies beyond `lengths` is not read.
        summaries: [batch, ceil(capacity / chunk_size), kv_heads, head_dim] float32, of the complete chunks.
        lengths: [batch] int32, up to capacity, the new token included. A sequence of length 0 gets zeros.
        chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block: as in dash_attention.
        state: the routing state, to which append_token has added this token. A sequence whose token begins a routing
            block routes, with the state's query; all others attend to the state's list. Needed when routing_block > 1;
            without it every sequence routes with q.
        backend: "reference" (torch), "triton" (CUDA, or CPU under TRITON_INTERPRET=1; head_dim a multiple of 16 up to
            256, chunk_size 16, 32, 64 or 128) or "auto": triton on CUDA where it can, else reference. Triton waits for
            nothing and launches the same programs at all lengths, so a CUDA graph can hold it.
        return_active: return (out, active_chunks).

    Returns: [batch, heads, head_dim] in q's type; with return_active also the number of chunks routed to, without the
        own one, [batch, kv_heads] int32.

    Raises: ValueError naming the argument, its shape and what was expected.
    """
    check_caches(q, k_cache, v_cache, lengths)
    check_per_chunk("summaries", summaries, k_cache, chunk_size)
    check_numbers(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    check_block(routing_block, chunk_size)
    check_state(state, q, k_cache.shape[2], summaries.shape[1], routing_block)
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block)
    obstacle = triton_obstacle(q, chunk_size) or stride_obstacle((q, k_cache, v_cache, summaries))
    on_triton = use_triton("dash_decode", backend, q, obstacle)
    lists = route_newest(q, summaries, lengths, config, state, on_triton)
    if on_triton:
        from dash_train.kernels.dash.triton.decode_attend import attend_lists

        out = attend_lists(q, k_cache, v_cache, lists, config)
    else:
        out = decode_reference.attend_lists(q, k_cache, v_cache, lists, lengths, config)
    return (out, _active_chunks(lists, config)) if return_active else out


def route_newest(
    q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig, state: RoutingState | None, on_triton: bool
) -> ChunkLists:
    """What the newest tokens attend to, for arguments already checked."""
    router_q, kept = (q, None) if state is None else (state.router_q, state.lists)
    if on_triton:
        from dash_train.kernels.dash.triton import decode_routing

        return decode_routing.route_newest(router_q, summaries, lengths.contiguous(), config, kept)
    return decode_reference.route_newest(router_q, summaries, lengths, config, kept)


def _active_chunks(lists: ChunkLists, config: DashConfig) -> Tensor:
    """All chunks of a list are full but the own one, which holds the newest token at least."""
    return (-(-lists.keys // config.chunk_size) - 1).clamp(min=0)
