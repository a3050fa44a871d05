"""The router's log-prior in decoding, for whoever attends in another way to what DashAttention would attend to."""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import stride_obstacle, use_triton
from dash_train.kernels.common.checks import check_dimensions, check_group, check_shape
from dash_train.kernels.dash.checks import check_block, check_numbers, triton_obstacle
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.decode import route_newest
from dash_train.kernels.dash.reference.decode import dense_prior
from dash_train.kernels.dash.routing_state import RoutingState, check_state


@torch.no_grad()
def decode_prior(
    q: Tensor,
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
) -> Tensor:
    """The bias that dash_decode gives the keys of each chunk. No host sync.

    Args:
        q: [batch, heads, head_dim], after RoPE, standing at position lengths - 1.
        summaries: [batch, chunks, kv_heads, head_dim] float32, of the complete chunks; the others are not looked at.
        lengths: [batch] int32, at least 1, the new token included.
        chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block, backend: as in dash_decode.
        state: as in dash_decode.

    Returns: [batch, kv_heads, chunks] float32 (float64 for float64 queries): b_c of the routed chunks, 0 for the own
        chunk, -inf for all others.

    Raises: ValueError naming the argument, its shape and what was expected.
    """
    check_dimensions("q", q, "batch", "heads", "head_dim")
    check_dimensions("summaries", summaries, "batch", "chunks", "kv_heads", "head_dim")
    chunks, kv_heads = summaries.shape[1:3]
    check_shape("summaries", summaries, batch=q.shape[0], chunks=chunks, kv_heads=kv_heads, head_dim=q.shape[2])
    check_shape("lengths", lengths, batch=q.shape[0])
    check_group(q.shape[1], kv_heads)
    check_numbers(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    check_block(routing_block, chunk_size)
    check_state(state, q, kv_heads, chunks, routing_block)
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block)
    obstacle = triton_obstacle(q, chunk_size) or stride_obstacle((q, summaries))
    on_triton = use_triton("decode_prior", backend, q, obstacle)
    return dense_prior(route_newest(q, summaries, lengths, config, state, on_triton), config)
