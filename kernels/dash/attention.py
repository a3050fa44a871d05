"""The public function: checks its arguments and hands them to a backend."""

from typing import Literal, overload

import torch
from torch import Tensor

from dash_train.kernels.common.backend import use_triton
from dash_train.kernels.dash.checks import (
    check_block,
    check_documents,
    check_heads,
    check_numbers,
    check_pieces,
    check_positions,
    check_router,
    check_support,
    triton_obstacle,
)
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.attention import dash_attention_reference
from dash_train.kernels.dash.stats import DashStats


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = ...,
    routing_scale: float = ...,
    prior_normalizer: str = ...,
    prior_temperature: float = ...,
    routing_block: int = ...,
    router_q: Tensor | None = ...,
    document_starts: Tensor | None = ...,
    query_starts: tuple[int, ...] = ...,
    support: Tensor | None = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = ...,
    routing_scale: float = ...,
    prior_normalizer: str = ...,
    prior_temperature: float = ...,
    routing_block: int = ...,
    router_q: Tensor | None = ...,
    document_starts: Tensor | None = ...,
    query_starts: tuple[int, ...] = ...,
    support: Tensor | None = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DashStats]: ...


def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    routing_block: int = 1,
    router_q: Tensor | None = None,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    support: Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DashStats]:
    """Causal DashAttention (arXiv 2605.18753; the mathematics is in docs/kernels.md), differentiable.

    Args:
        q: [batch, q_len, heads, head_dim], after RoPE. float64 is computed in float64, all else in float32.
        k, v: [batch, seq, kv_heads, head_dim], in q's type; kv_heads divides heads.
        chunk_query: [kv_heads, head_dim], the learned query that weighs a chunk's keys into its summary.
        chunk_size: tokens per chunk. seq need not be a multiple of it.
        routing_scale: factor on the routing scores; larger is sparser.
        prior_normalizer: what is subtracted from the log-probability of a routed chunk: "geometric_mean" over the
            routed chunks, "peak" (their maximum) or "none".
        prior_temperature: divides the result; unused with "none".
        routing_block: consecutive tokens that share a routing: a power of two that divides chunk_size. Documents are
            cut into such blocks from their first token on. 1 is the paper's.
        router_q: [batch, ceil(q_len / routing_block), heads, head_dim], what the router sees in place of q, in q's
            type and differentiable: one query a block, as router_queries makes them. Default, with a routing_block of
            1: q.
        document_starts: integer [batch, seq], the row position at which each token's document begins, a multiple of
            chunk_size; default one document a row.
        query_starts: q is this many equal pieces; piece i stands at positions query_starts[i], +1, ... of the row.
        support: bool [batch, heads, q_len, ceil(seq / chunk_size)], the chunks of positive probability as another
            backend found them, in place of finding them (reference only; for comparisons).
        backend: "reference" (torch), "triton" (CUDA, or CPU under TRITON_INTERPRET=1; head_dim a
            multiple of 16 up to 256, chunk_size 16, 32, 64 or 128) or "auto": triton on CUDA where it can, else
            reference.
        return_stats: return (out, DashStats).

    Returns: [batch, q_len, heads, head_dim] in q's type; with return_stats also the statistics.

    Raises: ValueError naming the argument, what it is and what was expected.
    """
    check_heads(q, k, v, chunk_query)
    check_numbers(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    check_block(routing_block, chunk_size)
    check_pieces(q, query_starts, "routing_block", routing_block)
    check_positions(q, k, chunk_size, query_starts)
    check_documents(document_starts, q.shape[0], k.shape[1])
    check_support(support, q, k, chunk_size)
    check_router(q, router_q, routing_block)
    obstacle = triton_obstacle(q, chunk_size) or (None if support is None else "finds its own support")
    on_triton = use_triton("dash_attention", backend, q, obstacle)
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block)
    if document_starts is None:
        document_starts = torch.zeros(1, k.shape[1], dtype=torch.int32, device=q.device)
    if on_triton:
        from dash_train.kernels.dash.triton.operator import dash_attention_triton

        out, stats = dash_attention_triton(
            q,
            k,
            v,
            chunk_query,
            router_q,
            config=config,
            document_starts=document_starts,
            query_starts=query_starts,
            return_stats=return_stats,
        )
    else:
        out, stats = dash_attention_reference(
            q,
            k,
            v,
            chunk_query,
            config=config,
            document_starts=document_starts,
            query_starts=query_starts,
            support=support,
            router_q=router_q,
        )
    if not return_stats:
        return out
    assert stats is not None
    return out, stats
