"""dash_attention in plain torch, block of query rows by block, so that memory stays linear in the sequence length.

With gradients each block is checkpointed: its scores are computed again in the backward pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.fused import attend_fast
from dash_train.kernels.dash.reference.stages import (
    Rows,
    group_heads,
    log_prior,
    route_rows,
    summarize,
    whole_chunks,
)
from dash_train.kernels.dash.stats import DashStats, RoutingCounts, by_token, count_eligible, tile_tokens

# Elements of one block's score matrix [batch, heads, rows, keys]; a handful of such matrices live at a time.
SCORES_PER_BLOCK = {"cpu": 2**21, "cuda": 2**27}


class Attended(NamedTuple):
    """The output [batch, kv_heads, group, rows, head_dim] of some rows, and their part of DashStats."""

    out: Tensor
    tau: Tensor
    row_max: Tensor
    normalizer: Tensor
    active_chunks: Tensor
    union_chunks: Tensor  # by tiles of tokens; all others by routing blocks
    residual: Tensor


class Block(NamedTuple):
    """Consecutive query rows of one piece, and the chunks that any of them may look at."""

    queries: slice
    positions: slice
    chunks: slice


def dash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
    support: Tensor | None,
    router_q: Tensor | None,
) -> tuple[Tensor, DashStats]:
    """(out, stats) of dash_attention for arguments already checked; document_starts is [batch or 1, seq].

    router_q [batch, blocks, heads, head_dim], one a routing block, may be of a wider type than q; None: q.
    """
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    keys, values = whole_chunks(k, config.chunk_size), whole_chunks(v, config.chunk_size)
    summaries = summarize(keys, chunk_query, config.chunk_size)
    grouped_q = group_heads(q, kv_heads)
    grouped_router_q = None if router_q is None else group_heads(router_q, kv_heads)
    grouped_support = None if support is None else support.unflatten(1, (kv_heads, group))
    blocks = query_blocks(q, k, document_starts, query_starts, config)

    def rows_of(block: Block) -> Rows:
        first_key = block.chunks.start * config.chunk_size
        seen = slice(first_key, block.chunks.stop * config.chunk_size)
        positions = torch.arange(block.positions.start, block.positions.stop, device=q.device)
        return Rows(
            q=grouped_q[:, :, :, block.queries],
            k=keys[:, :, seen],
            v=values[:, :, seen],
            summaries=summaries[:, :, block.chunks],
            positions=positions[None] - first_key,
            starts=document_starts[:, block.positions] - first_key,
            support=None if grouped_support is None else grouped_support[:, :, :, block.queries, block.chunks],
            router_q=None if grouped_router_q is None else grouped_router_q[:, :, :, routing_blocks(block)],
        )

    def routing_blocks(block: Block) -> slice:
        size = config.routing_block
        return slice(block.queries.start // size, -(-block.queries.stop // size))

    @torch.no_grad()
    def whole_support() -> Tensor:
        whole = grouped_q.new_zeros(*grouped_q.shape[:4], summaries.shape[2], dtype=torch.bool)
        for block in blocks:
            support = route_rows(rows_of(block), config).support
            tokens = block.queries.stop - block.queries.start
            whole[:, :, :, block.queries, block.chunks] = by_token(support, config.routing_block, tokens, 3)
        return whole.flatten(1, 2)

    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, k, v, chunk_query, router_q) if t is not None
    )
    attended = [
        checkpoint(attend_rows, rows_of(block), config, use_reentrant=False, preserve_rng_state=False)
        if needs_grad
        else attend_rows(rows_of(block), config)
        for block in blocks
    ]
    stats = DashStats(
        block_tau=torch.cat([a.tau for a in attended], -1).flatten(1, 2),
        block_row_max=torch.cat([a.row_max for a in attended], -1).flatten(1, 2),
        block_normalizer=torch.cat([a.normalizer for a in attended], -1),
        counts=RoutingCounts(
            active_chunks=torch.cat([a.active_chunks for a in attended], -1),
            union_chunks=torch.cat([a.union_chunks for a in attended], -1),
            residual=torch.stack([a.residual for a in attended]).amax(),
            tile=tile_tokens(group),
            block=config.routing_block,
            tokens=q.shape[1],
        ),
        pieces=len(query_starts),
        count_eligible=lambda: count_eligible(document_starts, query_starts, q.shape[1], config.chunk_size),
        support=whole_support,
    )
    out = torch.cat([a.out for a in attended], 3).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out.to(q.dtype), stats


def attend_rows(rows: Rows, config: DashConfig) -> Attended:
    """Stages 1 and 2 and the statistics of some rows."""
    routing = route_rows(rows, config)
    prior, normalizer = log_prior(routing, config)
    prior, routed = (by_token(t, config.routing_block, rows.q.shape[3], 2) for t in (prior, routing.routed))
    own_chunk = rows.positions // config.chunk_size
    own = torch.arange(prior.shape[-1], device=prior.device) == own_chunk[:, None, :, None]
    out = attend_fast(rows.q, rows.k, rows.v, prior.masked_fill(own, 0), rows.positions, config.chunk_size)

    tile = tile_tokens(rows.q.shape[2])
    tiles = F.pad(routed, (0, 0, 0, -routed.shape[2] % tile)).unflatten(2, (-1, tile))
    return Attended(
        out,
        routing.tau,
        routing.row_max,
        normalizer,
        active_chunks=routing.routed.sum(-1, dtype=torch.int32),
        union_chunks=tiles.any(3).sum(-1, dtype=torch.int32),
        residual=routing.residual,
    )


def query_blocks(
    q: Tensor, k: Tensor, document_starts: Tensor, query_starts: tuple[int, ...], config: DashConfig
) -> list[Block]:
    """Cuts the query pieces into blocks of whole tiles and whole routing blocks.

    Their score matrices stay within SCORES_PER_BLOCK.
    """
    batch, q_len, heads, _ = q.shape
    tile = math.lcm(tile_tokens(heads // k.shape[2]), config.routing_block)
    chunk_size = config.chunk_size
    rows_in_budget = SCORES_PER_BLOCK.get(q.device.type, 2**26) // (batch * heads * k.shape[1])
    size = max(tile, rows_in_budget // tile * tile)
    first_start = document_starts.amin(0).tolist()
    piece = q_len // len(query_starts)
    blocks = []
    for i, start in enumerate(query_starts):
        for low in range(0, piece, size):
            high = min(low + size, piece)
            chunks = slice(min(first_start[start + low : start + high]) // chunk_size, -(-(start + high) // chunk_size))
            blocks.append(Block(slice(i * piece + low, i * piece + high), slice(start + low, start + high), chunks))
    return blocks
