"""The forward pass of DashAttention in Triton: summaries, then routing, lists and attention segment by segment."""

from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.dash.attend import attend_segment
from dash_train.kernels.dash.lists import Prior, list_segment, new_prior
from dash_train.kernels.dash.routing import Routing, new_routing, route_segment
from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.stats import DashStats
from dash_train.kernels.dash.summaries import summarize_chunks
from dash_train.kernels.dash.tiles import Shape, new_lists


class Forward(NamedTuple):
    """The output, and what the backward pass and the statistics need."""

    out: Tensor  # [batch, q_len, heads, head_dim], in q's type
    lse: Tensor  # [batch, heads, q_len] fp32: natural log of stage 2's denominator, log-prior included
    summaries: Tensor  # [batch, chunks, kv_heads, head_dim] fp32
    routing: Routing
    prior: Prior


def dash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> tuple[Tensor, DashStats]:
    """The output, like q, and the statistics.

    Arguments as in dash_attention, checked; document_starts [batch or 1, seq].
    """
    q, k, v = (t if _suits_the_copy_engine(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    forward = dash_forward(
        q, k, v, chunk_query, config=config, document_starts=document_starts, query_starts=query_starts
    )
    shape = _shape(q, k, config)
    piece = shape.q_len // len(query_starts)
    eligible = [
        torch.arange(start, start + piece, device=q.device) // config.chunk_size
        - document_starts[:, start : start + piece] // config.chunk_size
        for start in query_starts
    ]
    stats = DashStats(
        tau=forward.routing.tau,
        row_max=forward.routing.row_max,
        normalizer=forward.prior.normalizer,
        active_chunks=forward.prior.active_chunks,
        eligible_chunks=torch.cat(eligible, -1).int().expand(shape.batch, -1),
        union_chunks=forward.routing.union_chunks,
        residual=forward.routing.residual.amax(),
        tile=shape.tile_tokens,
        pieces=len(query_starts),
        support=lambda: _support(q, k, chunk_query, config, document_starts, query_starts),
    )
    return forward.out, stats


def dash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Forward:
    """All stages. q, k and v as the copy engine wants them."""
    shape = _shape(q, k, config)
    summaries, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    prior = new_prior(shape, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty_like(routing.tau)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(q, parts, document_starts, config, shape, segment, lists, routing)
        list_segment(config, shape, segment, lists, routing, prior)
        attend_segment(q, k, v, shape, segment, lists, routing, out, lse)
    return Forward(out, lse, summaries, routing, prior)


def _suits_the_copy_engine(t: Tensor) -> bool:
    """Head vectors are contiguous, and every one of them starts on a multiple of 16 bytes."""
    strides_in_bytes = [stride * t.element_size() for stride in t.stride()[:-1]]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides_in_bytes)


def _shape(q: Tensor, k: Tensor, config: DashConfig) -> Shape:
    return Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], config.chunk_size)


def _support(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Tensor:
    """bool [batch, heads, q_len, chunks]: r > 0. Routes again, to the same bits."""
    shape = _shape(q, k, config)
    _, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    support = torch.zeros(shape.batch, shape.heads, shape.q_len, parts.shape[2], dtype=torch.bool, device=q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(q, parts, document_starts, config, shape, segment, lists, routing, support)
    return support
