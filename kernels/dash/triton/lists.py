"""Between routing and attention, in Triton: candidates become the list of routed chunks, pbar becomes the log-prior."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_MIN
from dash_train.kernels.dash.triton.routing import Routing
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape

LOG2_E = 1.4426950408889634


class Prior(NamedTuple):
    """Per routing block and KV head: [batch, kv_heads, q_blocks]."""

    normalizer: Tensor  # fp32: what was subtracted from log pbar; 0 for "none" and where nothing is routed
    active_chunks: Tensor  # int32: |R(t)|


def new_prior(shape: Shape, device: torch.device) -> Prior:
    """The outputs of list_segment, not yet written."""
    size = (shape.batch, shape.kv_heads, shape.q_blocks)
    return Prior(torch.empty(size, device=device), torch.empty(size, device=device, dtype=torch.int32))


def list_segment(
    config: DashConfig, shape: Shape, segment: Segment, lists: Lists, routing: Routing, out: Prior
) -> None:
    """Drops the candidates that none of a list's tokens is routed to; turns pbar into b_c log2(e), -inf outside R.

    In place: `lists` and routing.lengths. Writes routing.bits and the segment's blocks of `out`.
    """
    temperature = 1.0 if config.prior_normalizer == "none" else config.prior_temperature
    launch(
        list_kernel,
        (shape.lists(segment.tokens), shape.batch * shape.kv_heads),
        *lists,
        routing.lengths,
        routing.bits,
        *out,
        shape.q_blocks,
        routing.lengths.shape[2],
        shape.words,
        segment.row // shape.routing_block,
        shape.blocks(segment.tokens),
        segment.list,
        segment.chunks,
        LOG2_E / temperature,
        PBAR_MIN,
        BLOCKS=shape.list_blocks,
        WIDTH=max(32, 1024 // shape.list_blocks),
        NORMALIZER=config.prior_normalizer,
        num_warps=4,
    )


@triton.jit
def list_kernel(
    chunks_ptr,
    prior_ptr,
    lengths_ptr,
    bits_ptr,
    normalizer_ptr,
    active_ptr,
    q_blocks,
    row_lists,
    words,
    first_row,
    blocks,
    first_list,
    capacity,
    prior_scale,
    pbar_min,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """One program a list: one pass for the normaliser, one that shortens and writes."""
    own_list = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)  # batch * kv_heads + KV head
    per_list = sequence * row_lists + first_list + own_list
    lengths_ptr += per_list
    bits_ptr += per_list * words
    for start in range(0, words, WIDTH):
        word = start + tl.arange(0, WIDTH)
        tl.store(bits_ptr + word, tl.zeros([WIDTH], tl.int32), mask=word < words)
    candidates = tl.load(lengths_ptr)
    list_start = (sequence * tl.num_programs(0) + own_list) * capacity
    chunks_ptr += list_start
    block = tl.arange(0, BLOCKS)
    entry = tl.arange(0, WIDTH)
    prior_ptr += list_start * BLOCKS + block[None, :]

    active = tl.zeros([BLOCKS], tl.int32)
    log_sum = tl.zeros([BLOCKS], tl.float32)
    log_max = tl.full([BLOCKS], float("-inf"), tl.float32)
    for start in range(0, candidates, WIDTH):
        in_list = start + entry < candidates
        pbar = tl.load(prior_ptr + (start + entry)[:, None] * BLOCKS, mask=in_list[:, None], other=0.0)
        log_pbar = tl.log(tl.maximum(pbar, pbar_min))
        active += tl.sum((pbar > 0).to(tl.int32), 0)
        log_sum += tl.sum(tl.where(pbar > 0, log_pbar, 0.0), 0)
        log_max = tl.maximum(log_max, tl.max(tl.where(pbar > 0, log_pbar, float("-inf")), 0))

    normalizer = tl.zeros([BLOCKS], tl.float32)
    if NORMALIZER == "geometric_mean":
        normalizer = log_sum / tl.maximum(active, 1)
    elif NORMALIZER == "peak":
        normalizer = tl.where(active > 0, log_max, 0.0)
    length = 0
    for start in range(0, candidates, WIDTH):
        in_list = start + entry < candidates
        chunk = tl.load(chunks_ptr + start + entry, mask=in_list, other=0)
        pbar = tl.load(prior_ptr + (start + entry)[:, None] * BLOCKS, mask=in_list[:, None], other=0.0)
        prior = (tl.log(tl.maximum(pbar, pbar_min)) - normalizer[None, :]) * prior_scale
        prior = tl.where(pbar > 0, prior, float("-inf"))
        is_routed = tl.max(pbar, 1) > 0
        place = length + tl.cumsum(is_routed.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of a step is read before any of it is written; bits are clear
        tl.store(chunks_ptr + place, chunk, mask=is_routed)
        tl.store(prior_ptr + place[:, None] * BLOCKS, prior, mask=is_routed[:, None])
        tl.atomic_or(bits_ptr + chunk // 32, 1 << (chunk % 32), mask=is_routed, sem="relaxed")
        length += tl.sum(is_routed.to(tl.int32), 0)
    tl.store(lengths_ptr, length)

    is_block = own_list * BLOCKS + block < blocks
    per_block = sequence * q_blocks + first_row + own_list * BLOCKS + block
    tl.store(normalizer_ptr + per_block, normalizer, mask=is_block)
    tl.store(active_ptr + per_block, active, mask=is_block)
