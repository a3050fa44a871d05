"""DashAttention: attention over chunks that a sparse, differentiable router chooses. See docs/kernels.md."""

from dash_train.kernels.dash.attention import dash_attention
from dash_train.kernels.dash.decode import chunk_summaries, dash_decode, update_summaries
from dash_train.kernels.dash.prior import decode_prior
from dash_train.kernels.dash.router_gradient import router_gradient
from dash_train.kernels.dash.routing_scale import find_routing_scale, routing_density
from dash_train.kernels.dash.stats import DashStats, RoutingCounts, RoutingTotals, count_eligible, routing_totals

__all__ = [
    "DashStats",
    "RoutingCounts",
    "RoutingTotals",
    "chunk_summaries",
    "count_eligible",
    "dash_attention",
    "dash_decode",
    "decode_prior",
    "find_routing_scale",
    "router_gradient",
    "routing_density",
    "routing_totals",
    "update_summaries",
]
