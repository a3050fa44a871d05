"""Stage 1 in Triton: thresholds, and for every list the chunks its tokens may be routed to, with their probabilities.

A program owns a few routing blocks (see tiles.py); scores are never written to memory. With up to RESIDENT_CHUNKS
eligible chunks they stay in registers, and all chunks are candidates. With more, a sample of the chunks comes first:
its threshold is never above that of all chunks, so one pass finds the candidates, those that can matter to any row.
They are usually a tenth of all, and only their scores are computed again.

The threshold. With z relative to the row maximum, tau solves N(tau) = ||max(z - tau, 0)||_2 = 1. N is convex and
falling, so Newton's step tau + (N - 1) N / S, S = sum max(z - tau, 0), never passes the solution from below and comes
back below it from above: no bracket is needed. N rather than N^2, because far from the solution N is close to linear.
From -1/2 it takes 3 to 7 steps, whatever the scores and their number. docs/internals.md has the words: list, candidate,
segment, routing block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.rows import blocks_of
from dash_train.kernels.dash.triton.tiles import MIN_WIDTH, RESIDENT_CHUNKS, Lists, Segment, Shape, strides_of

STREAMED_WIDTH = 512  # chunks in the sample, and in a block of a pass, with more than RESIDENT_CHUNKS
MAX_STEPS = tl.constexpr(16)
TOLERANCE = tl.constexpr(1e-6)  # on |sum p - 1|
SLACK = tl.constexpr(1e-5)  # how far below a sample's threshold a chunk may lie and is still kept: covers rounding


class RoutingResults(NamedTuple):
    """What routing leaves behind for the statistics and the backward pass; all fp32 but the counts."""

    tau: Tensor  # [batch, heads, q_blocks], relative to row_max
    row_max: Tensor  # [batch, heads, q_blocks], of z; 0 where nothing is eligible
    lengths: Tensor  # [batch, kv_heads, lists] int32, of the lists; at first, the number of candidates
    residual: Tensor  # [batch, kv_heads, lists]: worst |sum p - 1| of the program that made the list
    bits: Tensor  # [batch, kv_heads, lists, words] int32: bit c % 32 of word c // 32: chunk c is in the list


def new_routing(shape: Shape, pieces: int, device: torch.device) -> RoutingResults:
    """The outputs of routing and of list_segment, not yet written."""
    per_head = (shape.batch, shape.heads, shape.q_blocks)
    per_list = (shape.batch, shape.kv_heads, pieces * shape.lists(shape.q_len // pieces))
    return RoutingResults(
        tau=torch.empty(per_head, device=device),
        row_max=torch.empty(per_head, device=device),
        lengths=torch.empty(per_list, device=device, dtype=torch.int32),
        residual=torch.empty(per_list, device=device),
        bits=torch.empty(*per_list, shape.words, device=device, dtype=torch.int32),
    )


def route_segment(
    router_q: Tensor,
    parts: Tensor,
    document_starts: Tensor,
    config: DashConfig,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    out: RoutingResults,
    support: Tensor | None = None,
) -> None:
    """Routes the queries of one segment: writes its rows of `out`, bits aside, and candidates with pbar to `lists`.

    router_q [batch, q_blocks, heads, head_dim]; parts [parts, batch, chunks, kv_heads, head_dim] of summarize_chunks;
    document_starts int32 [batch or 1, seq]. support: bool [batch, heads, q_blocks, chunks] of zeros, if it is wanted:
    the chunks of positive probability are marked in it.
    """
    resident = segment.chunks <= RESIDENT_CHUNKS
    width = max(MIN_WIDTH, power_of_two(segment.chunks)) if resident else STREAMED_WIDTH
    launch(
        route_kernel,
        (-(-shape.blocks(segment.tokens) // shape.router_blocks), shape.batch * shape.kv_heads),
        router_q,
        parts,
        document_starts,
        lists,
        out,
        support,
        strides_of(router_q),
        parts.stride(0),
        document_starts.stride(0) if document_starts.shape[0] > 1 else 0,
        segment,
        0.5 * config.score_scale(shape.head_dim),
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.rows_of_block(shape.router_blocks),
        BLOCKS=shape.router_blocks,
        LIST_BLOCKS=shape.list_blocks,
        ROUTING_BLOCK=shape.routing_block,
        CHUNK=shape.chunk_size,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=min(32 if width > 256 else 64, shape.head_dim & -shape.head_dim),
        PARTS=parts.shape[0],
        WIDTH=width,
        RESIDENT=resident,
        STAGES=3 if width > 256 else 2,
        num_warps=8 if width > 256 else 4,
    )


@triton.jit
def route_kernel(
    q_ptr,
    parts_ptr,
    document_starts_ptr,
    lists,
    out,
    support_ptr,
    q_strides,
    part_stride,
    documents_stride,
    segment,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LIST_BLOCKS: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program BLOCKS routing blocks, the longest histories first: tau of every row, pbar_c = mean of r_c^2.

    z_c = scale q.ktilde_c, r_c = max(z_c - row_max - tau, 0), and sum_c r_c^2 = 1.
    """
    ROWS: tl.constexpr = BLOCKS * PADDED_GROUP
    LISTS: tl.constexpr = BLOCKS // LIST_BLOCKS
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    first_block, blocks, row_blocks = blocks_of(segment, ROUTING_BLOCK)
    segment_lists = tl.cdiv(blocks, LIST_BLOCKS)
    row_chunks = tl.cdiv(segment.seq, CHUNK)

    # 1. The rows of these blocks, and where their results go.
    row = tl.arange(0, ROWS)
    block = program * BLOCKS + row // PADDED_GROUP  # within the segment
    head = row % PADDED_GROUP
    is_real = (block < blocks) & (head < GROUP)
    q_rows = q_ptr + batch * q_strides.batch + (first_block + block).to(tl.int64) * q_strides.token
    q_rows += (kv_head * GROUP + head) * q_strides.head
    per_head = (batch * KV_HEADS * GROUP + kv_head * GROUP + head) * row_blocks + first_block + block
    own_list = program * LISTS + tl.arange(0, LISTS)
    is_list = own_list < segment_lists
    per_list = batch_head * segment.row_lists + segment.list + own_list
    list_start = (batch_head * segment_lists + program * LISTS) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    pbar_ptr = lists.prior + list_start * LIST_BLOCKS

    # 2. The eligible chunks: from `first` on, so many.
    own = (segment.position + program * BLOCKS * ROUTING_BLOCK) // CHUNK
    first = tl.load(document_starts_ptr + batch * documents_stride + own * CHUNK) // CHUNK
    eligible = own - first
    if eligible == 0:
        tl.store(out.tau + per_head, tl.full([ROWS], -1.0, tl.float32), mask=is_real)
        tl.store(out.row_max + per_head, tl.zeros([ROWS], tl.float32), mask=is_real)
        tl.store(out.lengths + per_list, tl.zeros([LISTS], tl.int32), mask=is_list)
        tl.store(out.residual + per_list, tl.zeros([LISTS], tl.float32), mask=is_list)
        return

    # 3. The threshold of all chunks or, where they are many, of a sample: at most that of all.
    queries = (q_rows, is_real)
    first_summary = parts_ptr + ((batch * row_chunks + first) * KV_HEADS + kv_head) * HEAD_DIM
    summaries = (first_summary, KV_HEADS * HEAD_DIM, part_stride, eligible)
    lane = tl.arange(0, WIDTH)
    stride = 1 if RESIDENT else tl.cdiv(eligible, WIDTH)
    z = routing_scores(lane * stride, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
    row_max = tl.max(z, 1)
    z -= row_max[:, None]  # [ROWS, WIDTH]
    highest = -1.0 / tl.sqrt(tl.cdiv(eligible, stride).to(tl.float32))  # tau of equal scores
    tau = tl.zeros([ROWS], tl.float32) + tl.minimum(highest, -0.5)
    tau, residual = threshold(z, tau, highest)
    candidates = eligible

    # 4. Where they are many: the candidates, those above the sample's threshold in any row, and the threshold of these.
    if not RESIDENT:
        low = row_max + tau - SLACK  # [ROWS]
        candidates = 0
        for start in range(0, eligible, WIDTH):
            z = routing_scores(start + lane, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
            row_max = tl.maximum(row_max, tl.max(z, 1))
            is_candidate = tl.max((z > low[:, None]).to(tl.int32), 0)
            tl.store(chunks_ptr + candidates + tl.cumsum(is_candidate, 0) - 1, start + lane, mask=is_candidate > 0)
            candidates += tl.sum(is_candidate, 0)
        tl.debug_barrier()  # every thread reads what all have written

        highest = -1.0 / tl.sqrt(eligible.to(tl.float32))
        tau = tl.minimum(low - row_max, highest)
        if candidates <= WIDTH:
            chunk = tl.load(chunks_ptr + lane, mask=lane < candidates, other=eligible)
            z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
            tau, residual = threshold(z - row_max[:, None], tau, highest)
        else:
            residual = 1.0
            steps = 0
            while (residual > TOLERANCE) & (steps < MAX_STEPS):
                total = tl.zeros([ROWS], tl.float32)
                square = tl.zeros([ROWS], tl.float32)
                for start in range(0, candidates, WIDTH):
                    chunk = tl.load(chunks_ptr + start + lane, mask=start + lane < candidates, other=eligible)
                    z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
                    distance = tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)
                    total += tl.sum(distance, 1)
                    square += tl.sum(distance * distance, 1)
                residual = tl.max(tl.abs(square - 1.0), 0)
                if residual > TOLERANCE:
                    tau = newton_step(tau, total, square, highest)
                steps += 1

    # 5. The results, and the candidates with pbar.
    tl.store(out.tau + per_head, tau, mask=is_real)
    tl.store(out.row_max + per_head, row_max, mask=is_real)
    tl.store(out.residual + per_list, tl.zeros([LISTS], tl.float32) + residual, mask=is_list)
    tl.store(out.lengths + per_list, tl.zeros([LISTS], tl.int32) + candidates, mask=is_list)
    place = tl.arange(0, BLOCKS)
    pbar_start = (place // LIST_BLOCKS * segment.chunks).to(tl.int64) * LIST_BLOCKS + place % LIST_BLOCKS
    has_list = program * LISTS + place // LIST_BLOCKS < segment_lists
    for start in range(0, WIDTH if RESIDENT else candidates, WIDTH):
        entry = start + lane
        in_list = entry < candidates
        chunk = entry
        if not RESIDENT:
            chunk = tl.load(chunks_ptr + entry, mask=in_list, other=eligible)
            z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
            z -= row_max[:, None]
        root = tl.where(is_real[:, None], tl.maximum(z - tau[:, None], 0.0), 0.0)  # [ROWS, WIDTH]
        if support_ptr is not None:
            support = support_ptr + per_head[:, None] * row_chunks + first + chunk[None, :]
            tl.store(support, root > 0, mask=is_real[:, None] & in_list[None, :])
        pbar = tl.sum(tl.reshape(root * root, [BLOCKS, PADDED_GROUP, WIDTH]), 1) / GROUP  # [BLOCKS, WIDTH]
        for i in tl.static_range(LISTS):
            mask = in_list & (program * LISTS + i < segment_lists)
            tl.store(chunks_ptr + i * segment.chunks + entry, first + chunk, mask=mask)
        mask = has_list[:, None] & in_list[None, :]
        tl.store(pbar_ptr + pbar_start[:, None] + entry[None, :] * LIST_BLOCKS, pbar, mask=mask)


@triton.jit
def routing_scores(
    chunk,
    queries,
    summaries,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """scale * q.ktilde [ROWS, WIDTH] of the chunks `chunk` [WIDTH], from the first eligible; -inf past the last."""
    q_rows, is_real = queries
    first_summary, chunk_stride, part_stride, eligible = summaries
    is_eligible = chunk < eligible
    summary_rows = first_summary + chunk.to(tl.int64) * chunk_stride
    dim = tl.arange(0, BLOCK_DIM)
    z = tl.zeros([q_rows.shape[0], chunk.shape[0]], tl.float32)
    STEPS: tl.constexpr = HEAD_DIM // BLOCK_DIM
    for step in tl.range(0, PARTS * STEPS, num_stages=STAGES):
        start = (step % STEPS) * BLOCK_DIM + dim
        part = (step // STEPS) * part_stride
        q = tl.load(q_rows[:, None] + start[None, :], mask=is_real[:, None], other=0.0)  # [ROWS, BLOCK_DIM]
        summary = tl.load(summary_rows[:, None] + part + start[None, :], mask=is_eligible[:, None], other=0.0)
        z = tl.dot(q, tl.trans(summary), z, input_precision="ieee")
    return tl.where(is_eligible[None, :], z * scale, float("-inf"))


@triton.jit
def threshold(z, tau, highest):
    """tau [ROWS] of the scores z [ROWS, .] relative to their maximum, from a first guess; and the worst |sum p - 1|."""
    residual = 1.0
    steps = 0
    while (residual > TOLERANCE) & (steps < MAX_STEPS):
        distance = tl.maximum(z - tau[:, None], 0.0)
        total = tl.sum(distance, 1)
        square = tl.sum(distance * distance, 1)
        residual = tl.max(tl.abs(square - 1.0), 0)
        if residual > TOLERANCE:
            tau = newton_step(tau, total, square, highest)
        steps += 1
    return tau, residual


@triton.jit
def newton_step(tau, total, square, highest):
    """tau + (N - 1) N / S, at most `highest`: total [ROWS] is S, square [ROWS] is N^2."""
    norm = tl.sqrt(square)
    return tl.minimum(tau + (norm - 1.0) * norm / total, highest)
