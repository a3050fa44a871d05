"""The forward pass's lists and log-priors once more, in Triton: from what it left, without routing again.

A list's bits say which chunks it holds, so scores are computed of these alone, usually a tenth of all; tau stands
for everything that was solved. Scores come from the same products in the same order as in routing, hence are the same
to the bit, and with them who is routed where. docs/internals.md has the words: list, entry, segment.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import LOG2_E, power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_MIN, temperature
from dash_train.kernels.dash.triton.routing import routing_scores
from dash_train.kernels.dash.triton.rows import blocks_of, tile_rows
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, strides_of


class Kept(NamedTuple):
    """What the backward pass needs of routing, from the forward pass's RoutingResults, Prior and summarize_chunks."""

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
    launch(
        restore_kernel,
        (shape.lists(segment.tokens), shape.batch * shape.kv_heads),
        router_q,
        lists,
        kept,
        strides_of(router_q),
        kept.parts.stride(0),
        segment,
        0.5 * config.score_scale(shape.head_dim),
        LOG2_E / temperature(config),
        PBAR_MIN,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.rows_of_block(shape.list_blocks),
        BLOCKS=shape.list_blocks,
        ROUTING_BLOCK=shape.routing_block,
        CHUNK=shape.chunk_size,
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
    lists,
    kept,
    q_strides,
    part_stride,
    segment,
    scale,
    prior_scale,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a list, the longest histories first: pbar_c = mean of max(z_c - tau, 0)^2 over the group, then b_c.

    b_c = (log max(pbar_c, pbar_min) - normaliser) prior_scale, with prior_scale = log2(e) / prior_temperature.
    """
    own_list = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    first_block, blocks, row_blocks = blocks_of(segment, ROUTING_BLOCK)
    row_chunks = tl.cdiv(segment.seq, CHUNK)
    per_list = batch_head * segment.row_lists + segment.list + own_list
    length = tl.load(kept.lengths + per_list)
    if length == 0:
        return
    list_start = (batch_head * tl.num_programs(0) + own_list) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    prior_ptr = lists.prior + list_start * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    bits_ptr = kept.bits + per_list * tl.cdiv(row_chunks, 32)

    # 1. Bits become the list.
    used_words = tl.cdiv((segment.position + own_list * BLOCKS * ROUTING_BLOCK) // CHUNK, 32)
    word = tl.arange(0, WORDS)
    found = 0
    for start in range(0, used_words, WORDS):
        bits = tl.load(bits_ptr + start + word, mask=start + word < used_words, other=0)
        is_listed = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [WORDS * 32])  # one a chunk
        place = found + tl.cumsum(is_listed, 0) - 1
        tl.store(chunks_ptr + place, start * 32 + tl.arange(0, WORDS * 32), mask=is_listed > 0)
        found += tl.sum(is_listed, 0)
    tl.debug_barrier()  # every thread reads what all have written

    # 2. What was solved of each row, [BLOCKS * PADDED_GROUP].
    block, head, is_real = tile_rows(own_list, blocks, kv_head, GROUP, PADDED_GROUP, BLOCKS)
    q_rows = q_ptr + batch * q_strides.batch + (first_block + block).to(tl.int64) * q_strides.token
    q_rows += head * q_strides.head
    per_head = (batch * KV_HEADS * GROUP + head) * row_blocks + first_block + block
    tau = tl.load(kept.tau + per_head, mask=is_real, other=0.0)
    row_max = tl.load(kept.row_max + per_head, mask=is_real, other=float("inf"))  # r = 0 in rows that do not exist
    block = own_list * BLOCKS + tl.arange(0, BLOCKS)
    per_block = batch_head * row_blocks + first_block + block
    normalizer = tl.load(kept.normalizer + per_block, mask=block < blocks, other=0.0)  # [BLOCKS]

    # 3. The list gets its log-priors.
    queries = (q_rows, is_real)
    first_summary = kept.parts + (batch * row_chunks * KV_HEADS + kv_head) * HEAD_DIM
    summaries = (first_summary, KV_HEADS * HEAD_DIM, part_stride, row_chunks)
    for start in range(0, length, WIDTH):
        entry = start + tl.arange(0, WIDTH)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=row_chunks)
        z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
        root = tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)  # [ROWS, WIDTH]
        pbar = tl.sum(tl.reshape(root * root, [BLOCKS, PADDED_GROUP, WIDTH]), 1) / GROUP  # [BLOCKS, WIDTH]
        prior = (tl.log(tl.maximum(pbar, pbar_min)) - normalizer[:, None]) * prior_scale
        prior = tl.where(pbar > 0, prior, float("-inf"))
        tl.store(prior_ptr + entry[None, :] * BLOCKS, prior, mask=in_list[None, :])
