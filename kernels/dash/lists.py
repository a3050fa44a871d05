"""Between routing and attention, in Triton: candidates become the list of routed chunks, pbar becomes the log-prior."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.routing import Routing
from dash_train.kernels.dash.stages import PBAR_MIN, DashConfig
from dash_train.kernels.dash.tiles import Lists, Segment, Shape
from dash_train.kernels.launch import launch

LOG2_E = 1.4426950408889634


class Prior(NamedTuple):
    """Per token and KV head: [batch, kv_heads, q_len]."""

    normalizer: Tensor  # fp32: what was subtracted from log pbar; 0 for "none" and where nothing is routed
    active_chunks: Tensor  # int32: |R(t)|


def new_prior(shape: Shape, device: torch.device) -> Prior:
    """The outputs of list_segment, not yet written."""
    size = (shape.batch, shape.kv_heads, shape.q_len)
    return Prior(torch.empty(size, device=device), torch.empty(size, device=device, dtype=torch.int32))


def list_segment(
    config: DashConfig, shape: Shape, segment: Segment, lists: Lists, routing: Routing, out: Prior
) -> None:
    """Drops the candidates that no token of a tile is routed to; turns pbar into b_c log2(e), -inf outside R.

    In place: `lists`, and their lengths routing.union_chunks. Sets routing.union_bits; writes the segment's tokens of
    `out`.
    """
    temperature = 1.0 if config.prior_normalizer == "none" else config.prior_temperature
    launch(
        list_kernel,
        (shape.tiles(segment.tokens), shape.batch * shape.kv_heads),
        *lists,
        routing.union_chunks,
        routing.union_bits,
        *out,
        shape.q_len,
        routing.union_chunks.shape[2],
        shape.words,
        segment.row,
        segment.tokens,
        segment.tile,
        segment.chunks,
        LOG2_E / temperature,
        PBAR_MIN,
        TILE=shape.tile_tokens,
        BLOCK=max(32, 1024 // shape.tile_tokens),
        NORMALIZER=config.prior_normalizer,
        num_warps=4,
    )


@triton.jit
def list_kernel(
    chunks_ptr,
    prior_ptr,
    union_ptr,
    bits_ptr,
    normalizer_ptr,
    active_ptr,
    q_len,
    row_tiles,
    words,
    first_row,
    tokens,
    first_tile,
    capacity,
    prior_scale,
    pbar_min,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """One program a tile: one pass for the normaliser, one that shortens and writes."""
    tile = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)  # batch * kv_heads + KV head
    per_tile = sequence * row_tiles + first_tile + tile
    union_ptr += per_tile
    bits_ptr += per_tile * words
    candidates = tl.load(union_ptr)
    list_start = (sequence * tl.num_programs(0) + tile) * capacity
    chunks_ptr += list_start
    token = tl.arange(0, TILE)
    entry = tl.arange(0, BLOCK)
    prior_ptr += list_start * TILE + token[None, :]

    active = tl.zeros([TILE], tl.int32)
    log_sum = tl.zeros([TILE], tl.float32)
    log_max = tl.full([TILE], float("-inf"), tl.float32)
    for block in range(0, candidates, BLOCK):
        in_list = block + entry < candidates
        pbar = tl.load(prior_ptr + (block + entry)[:, None] * TILE, mask=in_list[:, None], other=0.0)
        log_pbar = tl.log(tl.maximum(pbar, pbar_min))
        active += tl.sum((pbar > 0).to(tl.int32), 0)
        log_sum += tl.sum(tl.where(pbar > 0, log_pbar, 0.0), 0)
        log_max = tl.maximum(log_max, tl.max(tl.where(pbar > 0, log_pbar, float("-inf")), 0))

    normalizer = tl.zeros([TILE], tl.float32)
    if NORMALIZER == "geometric_mean":
        normalizer = log_sum / tl.maximum(active, 1)
    elif NORMALIZER == "peak":
        normalizer = tl.where(active > 0, log_max, 0.0)
    length = 0
    for block in range(0, candidates, BLOCK):
        in_list = block + entry < candidates
        chunk = tl.load(chunks_ptr + block + entry, mask=in_list, other=0)
        pbar = tl.load(prior_ptr + (block + entry)[:, None] * TILE, mask=in_list[:, None], other=0.0)
        prior = (tl.log(tl.maximum(pbar, pbar_min)) - normalizer[None, :]) * prior_scale
        prior = tl.where(pbar > 0, prior, float("-inf"))
        is_routed = tl.max(pbar, 1) > 0
        place = length + tl.cumsum(is_routed.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of a block is read before any of it is written
        tl.store(chunks_ptr + place, chunk, mask=is_routed)
        tl.store(prior_ptr + place[:, None] * TILE, prior, mask=is_routed[:, None])
        tl.atomic_or(bits_ptr + chunk // 32, 1 << (chunk % 32), mask=is_routed, sem="relaxed")
        length += tl.sum(is_routed.to(tl.int32), 0)
    tl.store(union_ptr, length)

    is_token = tile * TILE + token < tokens
    per_token = sequence * q_len + first_row + tile * TILE + token
    tl.store(normalizer_ptr + per_token, normalizer, mask=is_token)
    tl.store(active_ptr + per_token, active, mask=is_token)
