"""The forward pass of DashAttention in Triton: summaries, then routing, lists and attention segment by segment."""

from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.attend import attend_segment
from dash_train.kernels.dash.triton.lists import Prior, list_segment, new_prior
from dash_train.kernels.dash.triton.restore import Kept
from dash_train.kernels.dash.triton.routing import RoutingResults, new_routing, route_segment
from dash_train.kernels.dash.triton.summaries import summarize_chunks
from dash_train.kernels.dash.triton.tiles import new_lists, shape_of


class Forward(NamedTuple):
    """The output, and what the backward pass and the statistics need."""

    out: Tensor  # [batch, q_len, heads, head_dim], in q's type
    lse: Tensor  # [batch, kv_heads, q_len, group] fp32: natural log of stage 2's denominator, log-prior included
    routing: RoutingResults
    prior: Prior
    summaries: tuple[Tensor, Tensor]  # of summarize_chunks

    @property
    def kept(self) -> Kept:
        """What the backward pass needs besides `out` and `lse`."""
        routing = self.routing
        return Kept(routing.tau, routing.row_max, self.prior.normalizer, routing.lengths, routing.bits, *self.summaries)


def dash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Forward:
    """All stages. q, k and v as TMA takes them; router_q None: q."""
    shape = shape_of(q, k, config.chunk_size, config.routing_block)
    routed_q = q if router_q is None else router_q
    summaries, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    prior = new_prior(shape, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(shape.batch, shape.kv_heads, shape.q_len, shape.group, device=q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(routed_q, parts, document_starts, config, shape, segment, lists, routing)
        list_segment(config, shape, segment, lists, routing, prior)
        attend_segment(q, k, v, shape, segment, lists, routing, out, lse)
    return Forward(out, lse, routing, prior, (summaries, parts))
