"""Stage 1's backward pass in Triton: from the gradients g_c of the log-priors to those of queries and summaries.

With e = g / prior_temperature (0 where pbar < 1e-6), a head's ds_c = r_c (f_c - kappa), where f_c = e_c / sum of r_c^2
over the group and kappa = sum_c r_c f_c / sum_c r_c. The scores are computed again; tau stands for all that was solved.

g_c is about r_c^(2 / temperature) of a barely routed chunk, divided here by r_c^2: the rounding errors of r cancel only
if both are the same r. fp32 scores therefore come, as in routing, from products "ieee" and are rounded once scaled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.restore import Kept
from dash_train.kernels.dash.rows import product_precision, tile_rows
from dash_train.kernels.dash.stages import PBAR_GRADIENT_MIN, DashConfig
from dash_train.kernels.dash.tiles import Lists, Segment, Shape
from dash_train.kernels.launch import launch

BLOCK = 64  # chunks of which a program takes the summaries' gradient
LIST_BLOCK = 32  # entries of a list at a time
PROGRAMS = 1024  # among which the tiles of a segment are divided for the summaries' gradient


def routing_backward_segment(
    q: Tensor,
    parts: Tensor,
    config: DashConfig,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    kept: Kept,
    dq: Tensor,
    dsummaries: Tensor,
) -> None:
    """Adds to a segment's rows of dq, and to dsummaries [batch * kv_heads, chunks, head_dim] fp32.

    parts as route_segment takes them; `lists` holds g_c in place of the log-prior. Afterwards it holds f_c, and not in
    the order of the list but at place c, where the summaries' gradient finds it without searching.
    """
    sequences, tiles = shape.batch * shape.kv_heads, shape.tiles(segment.tokens)
    kappa = torch.empty_like(kept.tau)
    common = {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "PADDED_GROUP": shape.padded_group,
        "TILE": shape.tile_tokens,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": shape.block_dim,
        "PARTS": parts.shape[0],
        "PRECISION": product_precision(shape),
    }
    score_scale = config.routing_scale * shape.head_dim**-0.5
    temperature = 1.0 if config.prior_normalizer == "none" else config.prior_temperature
    launch(
        routing_queries_kernel,
        (tiles, sequences),
        q,
        parts,
        *lists,
        kept.tau,
        kept.row_max,
        kept.union_chunks,
        kappa,
        dq,
        *q.stride()[:3],
        parts.stride(0),
        parts.shape[2],
        shape.q_len,
        kept.union_chunks.shape[2],
        segment.row,
        segment.tokens,
        segment.tile,
        segment.chunks,
        score_scale,
        1 / temperature,
        PBAR_GRADIENT_MIN,
        BLOCK=LIST_BLOCK,
        **common,
    )
    blocks = -(-segment.chunks // BLOCK)
    splits = max(1, min(tiles, PROGRAMS // (blocks * sequences)))
    partial = torch.empty(splits, sequences, blocks * BLOCK, shape.head_dim, device=q.device)
    launch(
        routing_summaries_kernel,
        (blocks, splits, sequences),
        q,
        parts,
        lists.prior,
        kept.tau,
        kept.row_max,
        kept.union_bits,
        kappa,
        partial,
        *q.stride()[:3],
        parts.stride(0),
        parts.shape[2],
        shape.q_len,
        kept.union_chunks.shape[2],
        shape.words,
        segment.row,
        segment.position // shape.chunk_size,
        segment.tokens,
        segment.tile,
        tiles,
        segment.chunks,
        score_scale,
        TILES_IN_CHUNK=shape.chunk_size // shape.tile_tokens,
        BLOCK=BLOCK,
        num_stages=2,
        **common,
    )
    dsummaries[:, : segment.chunks] += partial.sum(0)[:, : segment.chunks]


@triton.jit
def routing_queries_kernel(
    q_ptr,
    parts_ptr,
    chunks_ptr,
    g_ptr,
    tau_ptr,
    row_max_ptr,
    lengths_ptr,
    kappa_ptr,
    dq_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    part_stride,
    row_chunks,
    q_len,
    row_tiles,
    first_row,
    tokens,
    first_tile,
    capacity,
    scale,
    prior_scale,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a tile, the longest histories first: one pass for f and kappa, one for dq that also moves f."""
    ROWS: tl.constexpr = TILE * PADDED_GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    length = tl.load(lengths_ptr + sequence * row_tiles + first_tile + tile)
    if length == 0:
        return
    token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
    dim = tl.arange(0, BLOCK_DIM)
    mask = is_real[:, None] & (dim < HEAD_DIM)[None, :]
    q_rows = q_ptr + batch * q_batch_stride + (first_row + token).to(tl.int64) * q_token_stride + head * q_head_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=mask, other=0.0)
    per_head = (batch * HEADS + head) * q_len + first_row + token
    tau = tl.load(tau_ptr + per_head, mask=is_real, other=0.0)
    row_max = tl.load(row_max_ptr + per_head, mask=is_real, other=float("inf"))  # r = 0 in rows that do not exist
    list_start = (sequence * tl.num_programs(0) + tile) * capacity
    chunks_ptr += list_start
    g_ptr += list_start * TILE + tl.arange(0, TILE)[:, None]
    parts_ptr += (batch * row_chunks * KV_HEADS + kv_head) * HEAD_DIM

    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for block in range(0, length, BLOCK):
        entry = block + tl.arange(0, BLOCK)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=0)
        summaries = parts_ptr + chunk.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + dim[None, :]
        summary_mask = in_list[:, None] & (dim < HEAD_DIM)[None, :]
        root = _roots(q, summaries, part_stride, summary_mask, in_list, row_max, tau, 0.5 * scale, PARTS)
        square = tl.sum(tl.reshape(root * root, [TILE, PADDED_GROUP, BLOCK]), 1)
        g = tl.load(g_ptr + entry[None, :] * TILE, mask=in_list[None, :], other=0.0)
        f = tl.where(square >= pbar_min * GROUP, g * prior_scale / square, 0.0)
        tl.store(g_ptr + entry[None, :] * TILE, f, mask=in_list[None, :])
        total += tl.sum(root, 1)
        weighted += tl.sum(root * _per_row(f, TILE, PADDED_GROUP, BLOCK), 1)
    kappa = tl.where(total > 0, weighted / total, 0.0)
    tl.store(kappa_ptr + per_head, kappa, mask=is_real)
    tl.debug_barrier()  # every thread reads what all have written

    # From the last block to the first: a chunk's own place is never before its place in the list, so what moves there
    # covers nothing that is still to be read.
    dq = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    blocks = tl.cdiv(length, BLOCK)
    for step in range(blocks):
        entry = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=0)
        summaries = parts_ptr + chunk.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + dim[None, :]
        summary_mask = in_list[:, None] & (dim < HEAD_DIM)[None, :]
        root = _roots(q, summaries, part_stride, summary_mask, in_list, row_max, tau, 0.5 * scale, PARTS)
        f = tl.load(g_ptr + entry[None, :] * TILE, mask=in_list[None, :], other=0.0)
        ds = root * (_per_row(f, TILE, PADDED_GROUP, BLOCK) - kappa[:, None])
        for part in tl.static_range(PARTS):
            summary = tl.load(summaries + part * part_stride, mask=summary_mask, other=0.0)
            dq = tl.dot(ds.to(q.dtype), summary, dq, input_precision=PRECISION)
        tl.debug_barrier()  # all of a block is read before any of it is written
        tl.store(g_ptr + chunk[None, :] * TILE, f, mask=in_list[None, :])
    rows = ((batch * q_len + first_row + token) * HEADS + head) * HEAD_DIM
    dq_rows = dq_ptr + rows[:, None] + dim[None, :]
    before = tl.load(dq_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq_rows, (before + dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def routing_summaries_kernel(
    q_ptr,
    parts_ptr,
    f_ptr,
    tau_ptr,
    row_max_ptr,
    bits_ptr,
    kappa_ptr,
    partial_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    part_stride,
    row_chunks,
    q_len,
    row_tiles,
    words,
    first_row,
    first_chunk,
    tokens,
    first_tile,
    tiles,
    capacity,
    scale,
    TILES_IN_CHUNK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program BLOCK consecutive chunks and a share of the tiles that have any of them in their past."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    block = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    chunk = block * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = (dim < HEAD_DIM)[None, :]
    summaries = parts_ptr + ((batch * row_chunks + chunk) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    in_history = chunk < capacity
    high = tl.load(summaries, mask=in_history[:, None] & in_dim, other=0.0)
    if PARTS == 2:
        low = tl.load(summaries + part_stride, mask=in_history[:, None] & in_dim, other=0.0)
    bits_ptr += (sequence * row_tiles + first_tile) * words + chunk // 32
    f_ptr += chunk[:, None] * TILE + tl.arange(0, TILE)[None, :]

    first = tl.maximum((block * BLOCK + 1 - first_chunk) * TILES_IN_CHUNK, 0)
    share = tl.cdiv(tl.maximum(tiles - first, 0), tl.num_programs(1))
    begin = first + split * share
    dsummaries = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
        q_rows = q_ptr + batch * q_batch_stride + (first_row + token).to(tl.int64) * q_token_stride
        q_rows += head * q_head_stride
        q = tl.load(q_rows[:, None] + dim[None, :], mask=is_real[:, None] & in_dim, other=0.0)
        per_head = (batch * HEADS + head) * q_len + first_row + token
        tau = tl.load(tau_ptr + per_head, mask=is_real, other=0.0)
        row_max = tl.load(row_max_ptr + per_head, mask=is_real, other=float("inf"))
        kappa = tl.load(kappa_ptr + per_head, mask=is_real, other=0.0)
        bits = tl.load(bits_ptr + tile * words, mask=in_history, other=0)
        f = tl.load(f_ptr + (sequence * tiles + tile) * capacity * TILE, mask=in_history[:, None], other=0.0)

        z = tl.dot(high, tl.trans(q), input_precision="ieee")
        if PARTS == 2:
            z = tl.dot(low, tl.trans(q), z)
        is_listed = ((bits >> (chunk % 32)) & 1) > 0
        z = tl.where(is_listed[:, None], z * (0.5 * scale), float("-inf"))  # as in _roots
        root = tl.maximum(z - row_max[None, :] - tau[None, :], 0.0)
        f = tl.reshape(tl.broadcast_to(f[:, :, None], [BLOCK, TILE, PADDED_GROUP]), [BLOCK, TILE * PADDED_GROUP])
        # What was not listed has neither f nor, in a tile without any list, kappa.
        ds = tl.where(is_listed[:, None], root * (f - kappa[None, :]), 0.0)
        dsummaries = tl.dot(ds.to(q.dtype), q, dsummaries, input_precision=PRECISION)
    rows = (split.to(tl.int64) * tl.num_programs(2) + sequence) * (tl.num_programs(0) * BLOCK) + chunk
    tl.store(partial_ptr + rows[:, None] * HEAD_DIM + dim[None, :], dsummaries * scale, mask=in_dim)


@triton.jit
def _roots(q, summaries, part_stride, mask, is_listed, row_max, tau, scale, PARTS: tl.constexpr):
    """r = max(z - tau, 0) [rows, chunks] of q [rows, head_dim] and the summaries at pointers [chunks, head_dim]."""
    z = tl.dot(q, tl.trans(tl.load(summaries, mask=mask, other=0.0)), input_precision="ieee")
    for part in tl.static_range(1, PARTS):
        low = tl.load(summaries + part * part_stride, mask=mask, other=0.0)
        z = tl.dot(q, tl.trans(low), z)
    z = tl.where(is_listed[None, :], z * scale, float("-inf"))  # not one fused operation with what follows
    return tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)


@triton.jit
def _per_row(values, TILE: tl.constexpr, PADDED_GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """[TILE, BLOCK] -> [TILE * PADDED_GROUP, BLOCK]: a token's values for all its heads."""
    spread = tl.broadcast_to(values[:, None, :], [TILE, PADDED_GROUP, BLOCK])
    return tl.reshape(spread, [TILE * PADDED_GROUP, BLOCK])
