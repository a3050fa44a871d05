"""The router's log-prior in decoding, for whoever attends in another way to what DashAttention would attend to."""

import torch
from torch import Tensor

from dash_train.kernels.dash.checks import (
    BACKENDS,
    check_choice,
    check_dimensions,
    check_group,
    check_numbers,
    check_shape,
)
from dash_train.kernels.dash.decode import use_triton
from dash_train.kernels.dash.stages import DashConfig, eligible_chunks, group_heads, log_prior, route


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
    backend: str = "auto",
) -> Tensor:
    """The bias that dash_decode gives the keys of each chunk. No host sync.

    Args:
        q: [batch, heads, head_dim], after RoPE, standing at position lengths - 1.
        summaries: [batch, chunks, kv_heads, head_dim] float32, of the complete chunks; the others are not looked at.
        lengths: [batch] int32, at least 1, the new token included.
        chunk_size, routing_scale, prior_normalizer, prior_temperature, backend: as in dash_decode.

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
    check_choice("backend", backend, BACKENDS)
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    if use_triton("decode_prior", backend, q, (q, summaries), chunk_size):
        return _from_lists(q, summaries, lengths, config)
    grouped_q = group_heads(q[:, None], kv_heads)
    positions = lengths[:, None] - 1
    eligible = eligible_chunks(positions, torch.zeros_like(positions), chunks, chunk_size)
    routing = route(grouped_q, summaries.transpose(1, 2).to(grouped_q.dtype), eligible, routing_scale)
    own = torch.arange(chunks, device=q.device) == positions[:, None] // chunk_size
    return log_prior(routing, config)[0][:, :, 0].masked_fill(own, 0)


def _from_lists(q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig) -> Tensor:
    """The same from the lists of the Triton router."""
    from dash_train.kernels.dash.decode_routing import route_newest  # triton, which only this backend needs

    lists = route_newest(q, summaries, lengths.contiguous(), config)
    temperature = 1.0 if config.prior_normalizer == "none" else config.prior_temperature
    prior = (lists.log_pbar - lists.normalizer[..., None]) / temperature
    chunks = lists.chunks.shape[2]
    listed = -(-lists.keys // config.chunk_size)
    is_listed = torch.arange(chunks, device=q.device) < listed[..., None]
    place = torch.where(is_listed, lists.chunks, chunks).long()  # the rest of a list goes to a chunk past the last
    result = prior.new_full((*prior.shape[:2], chunks + 1), -torch.inf)
    return result.scatter_(2, place, prior)[..., :chunks]
