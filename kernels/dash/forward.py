"""The forward pass of DashAttention in Triton: summaries, then routing and attention segment by segment."""

from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.dash.attend import attend_segment
from dash_train.kernels.dash.prior import Prior, new_prior, prior_segment
from dash_train.kernels.dash.routing import Routing, new_routing, route_segment
from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.summaries import summarize_chunks
from dash_train.kernels.dash.tiles import Shape, new_lists


class Forward(NamedTuple):
    """The output and what the backward pass and the statistics need."""

    out: Tensor  # [batch, q_len, heads, head_dim], in q's type
    lse: Tensor  # [batch, heads, q_len] fp32: natural log of stage 2's denominator, log-prior included
    summaries: Tensor  # [batch, chunks, kv_heads, head_dim] fp32
    routing: Routing
    prior: Prior


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
    """All three stages. Arguments as in dash_attention, checked; document_starts int32 [batch or 1, seq]."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], config.chunk_size)
    summaries, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    prior = new_prior(shape, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty_like(routing.tau)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(q, parts, document_starts, config, shape, segment, lists, routing)
        prior_segment(config, shape, segment, lists, routing, prior)
        attend_segment(q, k, v, shape, segment, lists, routing, out, lse)
    return Forward(out, lse, summaries, routing, prior)
