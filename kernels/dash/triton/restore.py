"""The forward pass's lists and log-priors once more, in Triton: from what it left, without routing again.

A list's bits say which chunks it holds, so scores are computed of these alone, usually a tenth of all; tau stands
for everything that was solved. Scores come from the same products in the same order as in routing, hence are the same
to the bit, and with them who is routed where.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_MIN
from dash_train.kernels.dash.triton.lists import LOG2_E
from dash_train.kernels.dash.triton.routing import routing_scores
from dash_train.kernels.dash.triton.rows import tile_rows
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, power_of_two


class Kept(NamedTuple):
    """What the backward pass needs of routing, from the forward pass's Routing, Prior and summarize_chunks."""

    tau: Tensor
    row_max: Tensor
    normalizer: Tensor
    lengths: Tensor
    bits: Tensor
    summaries: Tensor
    parts: Tensor


def restore_segment(
    router_q: Tensor, config: DashConfig, shape: Shape, segment: Segment, kept: Kept, lists: Lists
) -> None:
    """Writes one segment's `lists`, as list_segment left them; their lengths are kept.lengths.

    router_q as in route_segment.
    """
    temperature = 1.0 if config.prior_normalizer == "none" else config.prior_temperature
    launch(
        restore_kernel,
        (shape.lists(segment.tokens), shape.batch * shape.kv_heads),
        router_q,
        kept.parts,
        *lists,
        kept.tau,
        kept.row_max,
        kept.normalizer,
        kept.lengths,
        kept.bits,
        *router_q.stride()[:3],
        kept.parts.stride(0),
        shape.chunks,
        shape.q_blocks,
        kept.lengths.shape[2],
        shape.words,
        segment.row // shape.routing_block,
        segment.position // shape.routing_block,
        shape.blocks(segment.tokens),
        segment.list,
        segment.chunks,
        0.5 * config.routing_scale * shape.head_dim**-0.5,
        LOG2_E / temperature,
        PBAR_MIN,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.rows_of_block(shape.list_blocks),
        BLOCKS=shape.list_blocks,
        CHUNK_BLOCKS=shape.chunk_size // shape.routing_block,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=min(64, shape.head_dim & -shape.head_dim),
        PARTS=kept.parts.shape[0],
        WIDTH=64,
        WORDS=min(16, power_of_two(shape.words)),
        STAGES=3,
        num_warps=4,
    )


@triton.jit
def restore_kernel(
    q_ptr,
    parts_ptr,
    chunks_ptr,
    prior_ptr,
    tau_ptr,
    row_max_ptr,
    normalizer_ptr,
    lengths_ptr,
    bits_ptr,
    q_batch_stride,
    q_block_stride,
    q_head_stride,
    part_stride,
    row_chunks,
    q_blocks,
    row_lists,
    words,
    first_row,
    first_position,
    blocks,
    first_list,
    capacity,
    scale,
    prior_scale,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a list, the longest histories first: bits become a list, then the list gets its log-priors.

    Rows and positions count routing blocks.
    """
    own_list = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    per_list = sequence * row_lists + first_list + own_list
    length = tl.load(lengths_ptr + per_list)
    if length == 0:
        return
    list_start = (sequence * tl.num_programs(0) + own_list) * capacity
    chunks_ptr += list_start
    prior_ptr += list_start * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    bits_ptr += per_list * words

    used_words = tl.cdiv((first_position + own_list * BLOCKS) // CHUNK_BLOCKS, 32)
    word = tl.arange(0, WORDS)
    found = 0
    for start in range(0, used_words, WORDS):
        bits = tl.load(bits_ptr + start + word, mask=start + word < used_words, other=0)
        is_listed = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [WORDS * 32])
        place = found + tl.cumsum(is_listed, 0) - 1
        tl.store(chunks_ptr + place, start * 32 + tl.arange(0, WORDS * 32), mask=is_listed > 0)
        found += tl.sum(is_listed, 0)
    tl.debug_barrier()  # every thread reads what all have written

    block, head, is_real = tile_rows(own_list, blocks, kv_head, GROUP, PADDED_GROUP, BLOCKS)
    q_rows = q_ptr + batch * q_batch_stride + (first_row + block).to(tl.int64) * q_block_stride + head * q_head_stride
    per_head = (batch * KV_HEADS * GROUP + head) * q_blocks + first_row + block
    tau = tl.load(tau_ptr + per_head, mask=is_real, other=0.0)
    row_max = tl.load(row_max_ptr + per_head, mask=is_real, other=float("inf"))  # r = 0 in rows that do not exist
    block = own_list * BLOCKS + tl.arange(0, BLOCKS)
    normalizer = tl.load(normalizer_ptr + sequence * q_blocks + first_row + block, mask=block < blocks, other=0.0)
    queries = (q_rows, is_real)
    first_summary = parts_ptr + (batch * row_chunks * KV_HEADS + kv_head) * HEAD_DIM
    summaries = (first_summary, KV_HEADS * HEAD_DIM, part_stride, row_chunks)
    for start in range(0, length, WIDTH):
        entry = start + tl.arange(0, WIDTH)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=row_chunks)
        z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
        root = tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)
        pbar = tl.sum(tl.reshape(root * root, [BLOCKS, PADDED_GROUP, WIDTH]), 1) / GROUP
        prior = (tl.log(tl.maximum(pbar, pbar_min)) - normalizer[:, None]) * prior_scale
        prior = tl.where(pbar > 0, prior, float("-inf"))
        tl.store(prior_ptr + entry[None, :] * BLOCKS, prior, mask=in_list[None, :])
