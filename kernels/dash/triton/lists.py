"""Between routing and attention, in Triton: candidates become the list of routed chunks, pbar becomes the log-prior.

docs/internals.md has the words: list, entry, segment.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import LOG2_E
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_MIN, temperature
from dash_train.kernels.dash.triton.routing import RoutingResults
from dash_train.kernels.dash.triton.rows import blocks_of
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape


class Prior(NamedTuple):
    """Per routing block and KV head: [batch, kv_heads, q_blocks]."""

    normalizer: Tensor  # fp32: what was subtracted from log pbar; 0 for "none" and where nothing is routed
    active_chunks: Tensor  # int32: |R(t)|


def new_prior(shape: Shape, device: torch.device) -> Prior:
    """The outputs of list_segment, not yet written."""
    size = (shape.batch, shape.kv_heads, shape.q_blocks)
    return Prior(torch.empty(size, device=device), torch.empty(size, device=device, dtype=torch.int32))


def list_segment(
    config: DashConfig, shape: Shape, segment: Segment, lists: Lists, routing: RoutingResults, out: Prior
) -> None:
    """Drops the candidates that none of a list's tokens is routed to; turns pbar into b_c log2(e), -inf outside R.

    In place: `lists` and routing.lengths. Writes routing.bits and the segment's blocks of `out`.
    """
    launch(
        shorten_lists_kernel,
        (shape.lists(segment.tokens), shape.batch * shape.kv_heads),
        lists,
        routing,
        out,
        segment,
        LOG2_E / temperature(config),
        PBAR_MIN,
        ROUTING_BLOCK=shape.routing_block,
        CHUNK=shape.chunk_size,
        BLOCKS=shape.list_blocks,
        WIDTH=max(32, 1024 // shape.list_blocks),
        NORMALIZER=config.prior_normalizer,
        num_warps=4,
    )


@triton.jit
def shorten_lists_kernel(
    lists,
    routing,
    out,
    segment,
    prior_scale,
    pbar_min,
    ROUTING_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """One program a list: b_c = (L_c - mean or maximum of L over R) / prior_temperature, L = log max(pbar, pbar_min).

    prior_scale is log2(e) / prior_temperature.
    """
    own_list = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    first_block, blocks, row_blocks = blocks_of(segment, ROUTING_BLOCK)
    words = tl.cdiv(tl.cdiv(segment.seq, CHUNK), 32)
    per_list = batch_head * segment.row_lists + segment.list + own_list
    lengths_ptr = routing.lengths + per_list
    bits_ptr = routing.bits + per_list * words
    for start in range(0, words, WIDTH):
        word = start + tl.arange(0, WIDTH)
        tl.store(bits_ptr + word, tl.zeros([WIDTH], tl.int32), mask=word < words)
    candidates = tl.load(lengths_ptr)
    list_start = (batch_head * tl.num_programs(0) + own_list) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    block = tl.arange(0, BLOCKS)
    entry = tl.arange(0, WIDTH)
    prior_ptr = lists.prior + list_start * BLOCKS + block[None, :]

    # 1. The normaliser of each block, [BLOCKS].
    active = tl.zeros([BLOCKS], tl.int32)
    log_sum = tl.zeros([BLOCKS], tl.float32)
    log_max = tl.full([BLOCKS], float("-inf"), tl.float32)
    for start in range(0, candidates, WIDTH):
        in_list = start + entry < candidates
        pbar = tl.load(prior_ptr + (start + entry)[:, None] * BLOCKS, mask=in_list[:, None], other=0.0)
        log_pbar = tl.log(tl.maximum(pbar, pbar_min))  # [WIDTH, BLOCKS]
        active += tl.sum((pbar > 0).to(tl.int32), 0)
        log_sum += tl.sum(tl.where(pbar > 0, log_pbar, 0.0), 0)
        log_max = tl.maximum(log_max, tl.max(tl.where(pbar > 0, log_pbar, float("-inf")), 0))
    normalizer = tl.zeros([BLOCKS], tl.float32)
    if NORMALIZER == "geometric_mean":
        normalizer = log_sum / tl.maximum(active, 1)
    elif NORMALIZER == "peak":
        normalizer = tl.where(active > 0, log_max, 0.0)

    # 2. The entries to which a block is routed move together.
    length = 0
    for start in range(0, candidates, WIDTH):
        in_list = start + entry < candidates
        chunk = tl.load(chunks_ptr + start + entry, mask=in_list, other=0)
        pbar = tl.load(prior_ptr + (start + entry)[:, None] * BLOCKS, mask=in_list[:, None], other=0.0)
        prior = (tl.log(tl.maximum(pbar, pbar_min)) - normalizer[None, :]) * prior_scale
        prior = tl.where(pbar > 0, prior, float("-inf"))  # [WIDTH, BLOCKS]
        is_routed = tl.max(pbar, 1) > 0  # [WIDTH]
        place = length + tl.cumsum(is_routed.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of a step is read before any of it is written; bits are clear
        tl.store(chunks_ptr + place, chunk, mask=is_routed)
        tl.store(prior_ptr + place[:, None] * BLOCKS, prior, mask=is_routed[:, None])
        tl.atomic_or(bits_ptr + chunk // 32, 1 << (chunk % 32), mask=is_routed, sem="relaxed")
        length += tl.sum(is_routed.to(tl.int32), 0)
    tl.store(lengths_ptr, length)

    is_block = own_list * BLOCKS + block < blocks
    per_block = batch_head * row_blocks + first_block + own_list * BLOCKS + block
    tl.store(out.normalizer + per_block, normalizer, mask=is_block)
    tl.store(out.active_chunks + per_block, active, mask=is_block)
