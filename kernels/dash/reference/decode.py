"""Decoding in plain torch: what triton/decode_routing.py and decode_attend.py do, by the definitions in stages.py."""

import torch
from torch import Tensor

from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.fused import attend_fast
from dash_train.kernels.dash.reference.stages import (
    PBAR_MIN,
    eligible_chunks,
    group_heads,
    log_prior,
    route,
    temperature,
    whole_chunks,
)


def route_newest(
    q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig, kept: ChunkLists | None = None
) -> ChunkLists:
    """What the newest tokens attend to.

    q [batch, heads, head_dim], the routers' queries; summaries [batch, chunks, kv_heads, head_dim].
    kept: the lists of the token before, changed in place: a sequence within a block keeps its list, and its own chunk
    grows. Without them every sequence routes.
    """
    position = (lengths.long() - 1).clamp(min=0)[:, None]
    own_chunk = position // config.chunk_size
    lists = _route_all(q, summaries, position, own_chunk, config)
    in_own = lengths[:, None] - own_chunk * config.chunk_size  # [batch, 1]
    lists = lists._replace(keys=(lists.keys * config.chunk_size + in_own).int())
    if kept is None:
        return lists
    begins = position % config.routing_block == 0
    routed = -(-kept.keys // config.chunk_size) - 1
    old = kept._replace(keys=(routed * config.chunk_size + in_own).int())
    for target, new, same in zip(kept, lists, old, strict=True):
        target.copy_(torch.where(begins[..., None] if new.dim() == 3 else begins, new, same))
    return kept


def _route_all(q: Tensor, summaries: Tensor, position: Tensor, own_chunk: Tensor, config: DashConfig) -> ChunkLists:
    """The lists of all sequences, but with the number of routed chunks for `keys`."""
    chunks, kv_heads = summaries.shape[1:3]
    grouped_q = group_heads(q[:, None], kv_heads)
    eligible = eligible_chunks(position, torch.zeros_like(position), chunks, config.chunk_size)
    routing = route(grouped_q, summaries.transpose(1, 2).to(grouped_q.dtype), eligible, config.routing_scale)
    _, normalizer = log_prior(routing, config)  # [batch, kv_heads, 1]
    routed, log_pbar = routing.routed[:, :, 0], routing.pbar[:, :, 0].clamp(min=PBAR_MIN).log()
    chunk = torch.arange(chunks, device=q.device)
    is_own = (chunk == own_chunk)[:, None]
    order = torch.where(routed | is_own, chunk, chunk + chunks).argsort(-1)  # the listed chunks first
    log_pbar = torch.where(is_own, normalizer, log_pbar).gather(2, order)
    return ChunkLists(order.int(), log_pbar, routed.sum(-1, dtype=torch.int32), normalizer[..., 0])


def attend_lists(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lists: ChunkLists, lengths: Tensor, config: DashConfig
) -> Tensor:
    """The output, like q [batch, heads, head_dim]. A sequence of length 0 sees one value, and that is zero."""
    unwritten = (torch.arange(k_cache.shape[1], device=q.device) >= lengths[:, None])[..., None, None]
    k, v = (whole_chunks(cache.masked_fill(unwritten, 0), config.chunk_size) for cache in (k_cache, v_cache))
    positions = lengths.clamp(min=1)[:, None] - 1
    grouped_q, prior = group_heads(q[:, None], k_cache.shape[2]), dense_prior(lists, config)
    out = attend_fast(grouped_q, k, v, prior[:, :, None], positions, config.chunk_size)
    return out.flatten(1, 3).to(q.dtype)


def dense_prior(lists: ChunkLists, config: DashConfig) -> Tensor:
    """b_c [batch, kv_heads, chunks] of the listed chunks, 0 for the own one and -inf for all others."""
    prior = (lists.log_pbar - lists.normalizer[..., None]) / temperature(config)
    chunks = lists.chunks.shape[2]
    listed = (-(-lists.keys // config.chunk_size)).clamp(min=1)  # of a sequence of length 0 too the own chunk
    is_listed = torch.arange(chunks, device=prior.device) < listed[..., None]
    place = torch.where(is_listed, lists.chunks, chunks).long()  # the rest of a list goes to a chunk past the last
    result = prior.new_full((*prior.shape[:2], chunks + 1), -torch.inf)
    return result.scatter_(2, place, prior)[..., :chunks]
