"""Stage 1 in Triton: thresholds, and for every tile the chunks its tokens may be routed to, with their probabilities.

A program owns one tile (see tiles.py); scores are never written to memory. With up to RESIDENT_CHUNKS eligible chunks
they stay in registers, and all chunks are candidates. With more, a sample of the chunks comes first: its threshold is
never above that of all chunks, so one pass finds the candidates, those that can matter to any row. They are usually a
tenth of all, and only their scores are computed again.

The threshold. With z relative to the row maximum, tau solves N(tau) = ||max(z - tau, 0)||_2 = 1. N is convex and
falling, so Newton's step tau + (N - 1) N / S, S = sum max(z - tau, 0), never passes the solution from below and comes
back below it from above: no bracket is needed. N rather than N^2, because far from the solution N is close to linear.
From -1/2 it takes 3 to 7 steps, whatever the scores and their number.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.tiles import MIN_WIDTH, RESIDENT_CHUNKS, Lists, Segment, Shape, power_of_two
from dash_train.kernels.launch import launch

STREAMED_WIDTH = 512  # chunks in the sample, and in a block of a pass, with more than RESIDENT_CHUNKS
MAX_STEPS = tl.constexpr(16)
TOLERANCE = tl.constexpr(1e-6)  # on |sum p - 1|
SLACK = tl.constexpr(1e-5)  # how far below a sample's threshold a chunk may lie and is still kept: covers rounding


class Routing(NamedTuple):
    """What routing leaves behind for the statistics and the backward pass; all fp32 but the counts."""

    tau: Tensor  # [batch, heads, q_len], relative to row_max
    row_max: Tensor  # [batch, heads, q_len], of z; 0 where nothing is eligible
    union_chunks: Tensor  # [batch, kv_heads, tiles] int32: the lengths of the lists; at first, of the candidates
    residual: Tensor  # [batch, kv_heads, tiles]: worst |sum p - 1| of a tile
    union_bits: Tensor  # [batch, kv_heads, tiles, words] int32: bit c % 32 of word c // 32: chunk c is in the list


def new_routing(shape: Shape, pieces: int, device: torch.device) -> Routing:
    """Routing's outputs, not yet written; no bit is set."""
    per_head = (shape.batch, shape.heads, shape.q_len)
    per_tile = (shape.batch, shape.kv_heads, pieces * shape.tiles(shape.q_len // pieces))
    return Routing(
        tau=torch.empty(per_head, device=device),
        row_max=torch.empty(per_head, device=device),
        union_chunks=torch.empty(per_tile, device=device, dtype=torch.int32),
        residual=torch.empty(per_tile, device=device),
        union_bits=torch.zeros(*per_tile, shape.words, device=device, dtype=torch.int32),
    )


def route_segment(
    q: Tensor,
    parts: Tensor,
    document_starts: Tensor,
    config: DashConfig,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    out: Routing,
    support: Tensor | None = None,
) -> None:
    """Routes the queries of one segment: writes its rows of `out`, bits aside, and candidates with pbar to `lists`.

    q [batch, q_len, heads, head_dim]; parts [parts, batch, chunks, kv_heads, head_dim] of summarize_chunks;
    document_starts int32 [batch or 1, seq]. support: bool [batch, heads, q_len, chunks] of zeros, if it is wanted:
    the chunks of positive probability are marked in it.
    """
    resident = segment.chunks <= RESIDENT_CHUNKS
    width = max(MIN_WIDTH, power_of_two(segment.chunks)) if resident else STREAMED_WIDTH
    launch(
        route_kernel,
        (shape.tiles(segment.tokens), shape.batch * shape.kv_heads),
        q,
        parts,
        document_starts,
        *lists,
        out.tau,
        out.row_max,
        out.union_chunks,
        out.residual,
        support,
        *q.stride()[:3],
        parts.stride(0),
        parts.shape[2],
        document_starts.stride(0) if document_starts.shape[0] > 1 else 0,
        shape.q_len,
        out.union_chunks.shape[2],
        *segment,
        0.5 * config.routing_scale * shape.head_dim**-0.5,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        TILE=shape.tile_tokens,
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
    chunks_ptr,
    pbar_ptr,
    tau_ptr,
    row_max_ptr,
    union_ptr,
    residual_ptr,
    support_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    part_stride,
    row_chunks,
    documents_stride,
    q_len,
    row_tiles,
    first_row,
    first_position,
    tokens,
    first_tile,
    capacity,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a tile, the longest histories first."""
    ROWS: tl.constexpr = TILE * PADDED_GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS

    row = tl.arange(0, ROWS)
    token = tile * TILE + row // PADDED_GROUP  # within the segment
    head = row % PADDED_GROUP
    is_real = (token < tokens) & (head < GROUP)
    q_rows = q_ptr + batch * q_batch_stride + (first_row + token).to(tl.int64) * q_token_stride
    q_rows += (kv_head * GROUP + head) * q_head_stride
    per_head = (batch * KV_HEADS * GROUP + kv_head * GROUP + head) * q_len + first_row + token
    per_tile = sequence * row_tiles + first_tile + tile
    list_start = (sequence * tl.num_programs(0) + tile) * capacity
    chunks_ptr += list_start
    pbar_ptr += list_start * TILE

    position = first_position + tile * TILE
    first = tl.load(document_starts_ptr + batch * documents_stride + position) // CHUNK
    eligible = position // CHUNK - first
    if eligible == 0:
        tl.store(tau_ptr + per_head, tl.full([ROWS], -1.0, tl.float32), mask=is_real)
        tl.store(row_max_ptr + per_head, tl.zeros([ROWS], tl.float32), mask=is_real)
        tl.store(union_ptr + per_tile, 0)
        tl.store(residual_ptr + per_tile, 0.0)
        return

    queries = (q_rows, is_real)
    first_summary = parts_ptr + ((batch * row_chunks + first) * KV_HEADS + kv_head) * HEAD_DIM
    summaries = (first_summary, KV_HEADS * HEAD_DIM, part_stride, eligible)
    lane = tl.arange(0, WIDTH)
    stride = 1 if RESIDENT else tl.cdiv(eligible, WIDTH)
    z = routing_scores(lane * stride, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
    row_max = tl.max(z, 1)
    z -= row_max[:, None]
    highest = -1.0 / tl.sqrt(tl.cdiv(eligible, stride).to(tl.float32))  # tau of equal scores
    tau = tl.zeros([ROWS], tl.float32) + tl.minimum(highest, -0.5)
    tau, residual = threshold(z, tau, highest)
    candidates = eligible
    if not RESIDENT:
        low = row_max + tau - SLACK
        candidates = 0
        for block in range(0, eligible, WIDTH):
            z = routing_scores(block + lane, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
            row_max = tl.maximum(row_max, tl.max(z, 1))
            is_candidate = tl.max((z > low[:, None]).to(tl.int32), 0)
            tl.store(chunks_ptr + candidates + tl.cumsum(is_candidate, 0) - 1, block + lane, mask=is_candidate > 0)
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
                for block in range(0, candidates, WIDTH):
                    chunk = tl.load(chunks_ptr + block + lane, mask=block + lane < candidates, other=eligible)
                    z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
                    distance = tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)
                    total += tl.sum(distance, 1)
                    square += tl.sum(distance * distance, 1)
                residual = tl.max(tl.abs(square - 1.0), 0)
                if residual > TOLERANCE:
                    tau = newton_step(tau, total, square, highest)
                steps += 1
    tl.store(tau_ptr + per_head, tau, mask=is_real)
    tl.store(row_max_ptr + per_head, row_max, mask=is_real)
    tl.store(residual_ptr + per_tile, residual)
    tl.store(union_ptr + per_tile, candidates)

    for block in range(0, WIDTH if RESIDENT else candidates, WIDTH):
        entry = block + lane
        in_list = entry < candidates
        chunk = entry
        if not RESIDENT:
            chunk = tl.load(chunks_ptr + entry, mask=in_list, other=eligible)
            z = routing_scores(chunk, queries, summaries, scale, HEAD_DIM, BLOCK_DIM, PARTS, STAGES)
            z -= row_max[:, None]
        root = tl.where(is_real[:, None], tl.maximum(z - tau[:, None], 0.0), 0.0)
        if support_ptr is not None:
            support = support_ptr + per_head[:, None] * row_chunks + first + chunk[None, :]
            tl.store(support, root > 0, mask=is_real[:, None] & in_list[None, :])
        pbar = tl.sum(tl.reshape(root * root, [TILE, PADDED_GROUP, WIDTH]), 1) / GROUP
        tl.store(chunks_ptr + entry, first + chunk, mask=in_list)
        tl.store(pbar_ptr + entry[None, :] * TILE + tl.arange(0, TILE)[:, None], pbar, mask=in_list[None, :])


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
        q = tl.load(q_rows[:, None] + start[None, :], mask=is_real[:, None], other=0.0)
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
    norm = tl.sqrt(square)
    return tl.minimum(tau + (norm - 1.0) * norm / total, highest)
