"""DashAttention: attention over chunks that a sparse, differentiable router chooses. See docs/kernels.md."""

from dash_train.kernels.dash.attention import dash_attention
from dash_train.kernels.dash.stats import DashStats, RoutingTotals

__all__ = ["DashStats", "RoutingTotals", "dash_attention"]
