"""DashAttention: attention over chunks that a sparse, differentiable router chooses. See docs/kernels.md."""

from dash_train.kernels.dash.append import append_prompts, append_token
from dash_train.kernels.dash.attention import dash_attention
from dash_train.kernels.dash.decode import chunk_summaries, dash_decode, update_summaries
from dash_train.kernels.dash.prior import decode_prior
from dash_train.kernels.dash.router_gradient import router_gradient
from dash_train.kernels.dash.router_queries import router_queries
from dash_train.kernels.dash.routing_scale import find_routing_scale, routing_density, sample_blocks
from dash_train.kernels.dash.routing_state import RoutingState
from dash_train.kernels.dash.stats import DashStats, RoutingCounts, RoutingTotals, count_eligible, routing_totals

__all__ = [
    "DashStats",
    "RoutingCounts",
    "RoutingState",
    "RoutingTotals",
    "append_prompts",
    "append_token",
    "chunk_summaries",
    "count_eligible",
    "dash_attention",
    "dash_decode",
    "decode_prior",
    "find_routing_scale",
    "router_gradient",
    "router_queries",
    "routing_density",
    "routing_totals",
    "sample_blocks",
    "update_summaries",
]
