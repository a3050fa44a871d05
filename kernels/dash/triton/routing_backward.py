"""Stage 1's backward pass in Triton: from the gradients g_c of the log-priors to those of queries and summaries.

With e = g / prior_temperature (0 where pbar < 1e-6), a head's ds_c = r_c (f_c - kappa), where f_c = e_c / sum of r_c^2
over the group and kappa = sum_c r_c f_c / sum_c r_c. The scores are computed again; tau stands for all that was solved.

g_c is about r_c^(2 / temperature) of a barely routed chunk, divided here by r_c^2: the rounding errors of r cancel only
if both are the same r. fp32 scores therefore come, as in routing, from products "ieee" and are rounded once scaled.
docs/internals.md has the words: list, entry, segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_GRADIENT_MIN, temperature
from dash_train.kernels.dash.triton.restore import Kept
from dash_train.kernels.dash.triton.rows import blocks_of, product_precision, tile_rows
from dash_train.kernels.dash.triton.tiles import TILE_ROWS, Lists, Segment, Shape, strides_of

WIDTH = 64  # chunks of which a program takes the summaries' gradient
LIST_WIDTH = 32  # entries of a list at a time
PROGRAMS = 1024  # among which the routing blocks of a segment are divided for the summaries' gradient, strides_of


def new_summary_gradients(shape: Shape, device: torch.device) -> Tensor:
    """Zeros [shares, batch * kv_heads, chunks, head_dim] fp32: the gradients of summaries are their sum.

    The programs that walk the tokens of a segment each add to one of them.
    """
    batch_heads = shape.batch * shape.kv_heads
    tiles = -(-shape.q_blocks // routed_together(shape))
    shares = max(1, min(tiles, PROGRAMS // (-(-shape.chunks // WIDTH) * batch_heads)))
    return torch.zeros(shares, batch_heads, shape.chunks, shape.head_dim, device=device)


def routing_backward_segment(
    router_q: Tensor,
    config: DashConfig,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    g: Tensor,
    kept: Kept,
    drouter_q: Tensor,
    dsummaries: Tensor,
    add: bool,
) -> None:
    """Writes a segment's rows of drouter_q, or adds to them; adds to the dsummaries of new_summary_gradients.

    router_q as route_segment takes it, drouter_q like router_q and contiguous, g as attend_backward_segment left it.
    Afterwards lists.prior holds f_c, and not in the order of the list but at place c, where the summaries'
    gradient finds it without searching.
    """
    batch_heads = shape.batch * shape.kv_heads
    kappa = torch.empty_like(kept.tau)
    score_scale = config.score_scale(shape.head_dim)
    common = {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "ROUTING_BLOCK": shape.routing_block,
        "CHUNK": shape.chunk_size,
        "LIST_BLOCKS": shape.list_blocks,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": shape.block_dim,
        "PARTS": kept.parts.shape[0],
        "PRECISION": product_precision(shape),
    }
    launch(
        routing_queries_kernel,
        (shape.lists(segment.tokens), batch_heads),
        router_q,
        lists,
        g,
        kept,
        kappa,
        drouter_q,
        strides_of(router_q),
        kept.parts.stride(0),
        segment,
        score_scale,
        1 / temperature(config),
        PBAR_GRADIENT_MIN,
        PADDED_GROUP=shape.rows_of_block(shape.list_blocks),
        TILES=g.shape[-1] if g is not lists.prior else 1,
        ADD=add,
        WIDTH=LIST_WIDTH,
        **common,
    )
    launch(
        routing_summaries_kernel,
        (-(-segment.chunks // WIDTH), dsummaries.shape[0], batch_heads),
        router_q,
        lists,
        kept,
        kappa,
        dsummaries,
        strides_of(router_q),
        kept.parts.stride(0),
        segment,
        score_scale,
        PADDED_GROUP=shape.padded_group,
        BLOCKS=routed_together(shape),
        WIDTH=WIDTH,
        num_stages=2,
        **common,
    )


def routed_together(shape: Shape) -> int:
    """Routing blocks whose rows make a matrix of the summaries' gradient."""
    return max(1, TILE_ROWS // shape.padded_group)


@triton.jit
def routing_queries_kernel(
    q_ptr,
    lists,
    g_ptr,
    kept,
    kappa_ptr,
    dq_ptr,
    q_strides,
    part_stride,
    segment,
    scale,
    prior_scale,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILES: tl.constexpr,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a list, the longest histories first: f_c, kappa, and dq = scale sum_c r_c (f_c - kappa) ktilde_c.

    prior_scale is 1 / prior_temperature. f moves from the list's order to place c.
    """
    ROWS: tl.constexpr = LIST_BLOCKS * PADDED_GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    own_list = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    first_block, blocks, row_blocks = blocks_of(segment, ROUTING_BLOCK)
    row_chunks = tl.cdiv(segment.seq, CHUNK)
    length = tl.load(kept.lengths + batch_head * segment.row_lists + segment.list + own_list)
    if ADD and length == 0:
        return

    # 1. The rows of the list's blocks.
    block, head, is_real = tile_rows(own_list, blocks, kv_head, GROUP, PADDED_GROUP, LIST_BLOCKS)
    dim = tl.arange(0, BLOCK_DIM)
    mask = is_real[:, None] & (dim < HEAD_DIM)[None, :]
    q_rows = q_ptr + batch * q_strides.batch + (first_block + block).to(tl.int64) * q_strides.token
    q_rows += head * q_strides.head
    q = tl.load(q_rows[:, None] + dim[None, :], mask=mask, other=0.0)  # [ROWS, BLOCK_DIM]
    per_head = (batch * HEADS + head) * row_blocks + first_block + block
    tau = tl.load(kept.tau + per_head, mask=is_real, other=0.0)
    row_max = tl.load(kept.row_max + per_head, mask=is_real, other=float("inf"))  # r = 0 in rows that do not exist
    list_start = (batch_head * tl.num_programs(0) + own_list) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    f_ptr = lists.prior + list_start * LIST_BLOCKS + tl.arange(0, LIST_BLOCKS)[:, None]
    g_ptr += list_start * LIST_BLOCKS * TILES
    parts_ptr = kept.parts + (batch * row_chunks * KV_HEADS + kv_head) * HEAD_DIM

    # 2. f of every entry, and kappa.
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for start in range(0, length, WIDTH):
        entry = start + tl.arange(0, WIDTH)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=0)
        summaries = parts_ptr + chunk.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + dim[None, :]
        summary_mask = in_list[:, None] & (dim < HEAD_DIM)[None, :]
        root = _roots(q, summaries, part_stride, summary_mask, in_list, row_max, tau, 0.5 * scale, PARTS)
        square = tl.sum(tl.reshape(root * root, [LIST_BLOCKS, PADDED_GROUP, WIDTH]), 1)  # [LIST_BLOCKS, WIDTH]
        if TILES > 1:  # of one block
            g_tiles = g_ptr + entry[:, None] * TILES + tl.arange(0, TILES)[None, :]
            g = tl.sum(tl.load(g_tiles, mask=in_list[:, None], other=0.0), 1)[None, :]
        else:
            g_rows = g_ptr + entry[None, :] * LIST_BLOCKS + tl.arange(0, LIST_BLOCKS)[:, None]
            g = tl.load(g_rows, mask=in_list[None, :], other=0.0)
        f = tl.where(square >= pbar_min * GROUP, g * prior_scale / square, 0.0)
        tl.store(f_ptr + entry[None, :] * LIST_BLOCKS, f, mask=in_list[None, :])
        total += tl.sum(root, 1)
        weighted += tl.sum(root * _per_row(f, LIST_BLOCKS, PADDED_GROUP, WIDTH), 1)
    kappa = tl.where(total > 0, weighted / total, 0.0)
    tl.store(kappa_ptr + per_head, kappa, mask=is_real)
    tl.debug_barrier()  # every thread reads what all have written

    # 3. dq. From the last step to the first: a chunk's own place is never before its place in the list, so what moves
    # there covers nothing that is still to be read.
    dq = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    steps = tl.cdiv(length, WIDTH)
    for step in range(steps):
        entry = (steps - 1 - step) * WIDTH + tl.arange(0, WIDTH)
        in_list = entry < length
        chunk = tl.load(chunks_ptr + entry, mask=in_list, other=0)
        summaries = parts_ptr + chunk.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + dim[None, :]
        summary_mask = in_list[:, None] & (dim < HEAD_DIM)[None, :]
        root = _roots(q, summaries, part_stride, summary_mask, in_list, row_max, tau, 0.5 * scale, PARTS)
        f = tl.load(f_ptr + entry[None, :] * LIST_BLOCKS, mask=in_list[None, :], other=0.0)
        ds = root * (_per_row(f, LIST_BLOCKS, PADDED_GROUP, WIDTH) - kappa[:, None])  # [ROWS, WIDTH]
        for part in tl.static_range(PARTS):
            summary = tl.load(summaries + part * part_stride, mask=summary_mask, other=0.0)
            dq = tl.dot(ds.to(q.dtype), summary, dq, input_precision=PRECISION)
        tl.debug_barrier()  # all of a step is read before any of it is written
        tl.store(f_ptr + chunk[None, :] * LIST_BLOCKS, f, mask=in_list[None, :])
    rows = ((batch * row_blocks + first_block + block) * HEADS + head) * HEAD_DIM
    dq_rows = dq_ptr + rows[:, None] + dim[None, :]
    dq *= scale
    if ADD:
        dq += tl.load(dq_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq_rows, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def routing_summaries_kernel(
    q_ptr,
    lists,
    kept,
    kappa_ptr,
    dsummaries_ptr,
    q_strides,
    part_stride,
    segment,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program WIDTH consecutive chunks and a share of the routing blocks that have any of them in their past.

    dktilde_c = scale sum of r_c (f_c - kappa) q over rows.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    LISTS: tl.constexpr = BLOCKS // LIST_BLOCKS
    first_chunk_here = tl.program_id(0) * WIDTH
    own_share = tl.program_id(1)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(2), KV_HEADS)
    first_block, blocks, row_blocks = blocks_of(segment, ROUTING_BLOCK)
    segment_lists = tl.cdiv(blocks, LIST_BLOCKS)
    row_chunks = tl.cdiv(segment.seq, CHUNK)
    words = tl.cdiv(row_chunks, 32)

    # 1. The share: tiles begin .. end - 1 of BLOCKS blocks.
    tiles = tl.cdiv(blocks, BLOCKS)
    first = tl.maximum((first_chunk_here + 1 - segment.position // CHUNK) * (CHUNK // ROUTING_BLOCK), 0) // BLOCKS
    share = tl.cdiv(tl.maximum(tiles - first, 0), tl.num_programs(1))
    begin = first + own_share * share
    end = tl.minimum(begin + share, tiles)
    if begin >= end:
        return

    # 2. The chunks' summaries.
    chunk = first_chunk_here + tl.arange(0, WIDTH)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = (dim < HEAD_DIM)[None, :]
    summaries = kept.parts + ((batch * row_chunks + chunk) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    in_history = chunk < segment.chunks
    high = tl.load(summaries, mask=in_history[:, None] & in_dim, other=0.0)  # [WIDTH, BLOCK_DIM]
    if PARTS == 2:
        low = tl.load(summaries + part_stride, mask=in_history[:, None] & in_dim, other=0.0)
    bits_ptr = kept.bits + (batch_head * segment.row_lists + segment.list) * words + chunk[:, None] // 32
    f_ptr = lists.prior + batch_head * segment_lists * segment.chunks * LIST_BLOCKS + chunk[:, None] * LIST_BLOCKS

    # 3. Tile by tile; a matrix here is [WIDTH, BLOCKS * PADDED_GROUP].
    dsummaries = tl.zeros([WIDTH, BLOCK_DIM], tl.float32)
    for tile in range(begin, end):
        block, head, is_real = tile_rows(tile, blocks, kv_head, GROUP, PADDED_GROUP, BLOCKS)
        q_rows = q_ptr + batch * q_strides.batch + (first_block + block).to(tl.int64) * q_strides.token
        q_rows += head * q_strides.head
        q = tl.load(q_rows[:, None] + dim[None, :], mask=is_real[:, None] & in_dim, other=0.0)
        per_head = (batch * HEADS + head) * row_blocks + first_block + block
        tau = tl.load(kept.tau + per_head, mask=is_real, other=0.0)
        row_max = tl.load(kept.row_max + per_head, mask=is_real, other=float("inf"))
        kappa = tl.load(kappa_ptr + per_head, mask=is_real, other=0.0)
        own_list = tile * LISTS + tl.arange(0, LISTS)[None, :]
        bits = tl.load(bits_ptr + own_list * words, mask=in_history[:, None] & (own_list < segment_lists), other=0)
        place = tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        f_block = (place // LIST_BLOCKS).to(tl.int64) * segment.chunks * LIST_BLOCKS + place % LIST_BLOCKS
        f = tl.load(f_ptr + f_block, mask=in_history[:, None] & (place < blocks), other=0.0)

        z = tl.dot(high, tl.trans(q), input_precision="ieee")
        if PARTS == 2:
            z = tl.dot(low, tl.trans(q), z)
        is_listed = _spread((bits >> (chunk % 32)[:, None]) & 1, WIDTH, LISTS, BLOCKS * PADDED_GROUP) > 0
        z = tl.where(is_listed, z * (0.5 * scale), float("-inf"))  # as in _roots
        root = tl.maximum(z - row_max[None, :] - tau[None, :], 0.0)
        f = _spread(f, WIDTH, BLOCKS, BLOCKS * PADDED_GROUP)
        # What was not listed has neither f nor, where a list is empty, kappa.
        ds = tl.where(is_listed, root * (f - kappa[None, :]), 0.0)
        dsummaries = tl.dot(ds.to(q.dtype), q, dsummaries, input_precision=PRECISION)

    # 4. Added to what the segments before left.
    rows = (own_share.to(tl.int64) * tl.num_programs(2) + batch_head) * row_chunks + chunk
    dsummaries_ptr += rows[:, None] * HEAD_DIM + dim[None, :]
    mask = in_history[:, None] & in_dim
    tl.store(dsummaries_ptr, tl.load(dsummaries_ptr, mask=mask) + dsummaries * scale, mask=mask)


@triton.jit
def _roots(q, summaries, part_stride, mask, is_listed, row_max, tau, scale, PARTS: tl.constexpr):
    """r = max(z - tau, 0) [ROWS, WIDTH] of q [ROWS, BLOCK_DIM] and the summaries at pointers [WIDTH, BLOCK_DIM]."""
    z = tl.dot(q, tl.trans(tl.load(summaries, mask=mask, other=0.0)), input_precision="ieee")
    for part in tl.static_range(1, PARTS):
        low = tl.load(summaries + part * part_stride, mask=mask, other=0.0)
        z = tl.dot(q, tl.trans(low), z)
    z = tl.where(is_listed[None, :], z * scale, float("-inf"))  # not one fused operation with what follows
    return tl.maximum(z - row_max[:, None] - tau[:, None], 0.0)


@triton.jit
def _per_row(values, BLOCKS: tl.constexpr, PADDED_GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCKS, WIDTH] -> [BLOCKS * PADDED_GROUP, WIDTH]: a block's values for all its heads."""
    spread = tl.broadcast_to(values[:, None, :], [BLOCKS, PADDED_GROUP, WIDTH])
    return tl.reshape(spread, [BLOCKS * PADDED_GROUP, WIDTH])


@triton.jit
def _spread(values, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """[WIDTH, PARTS] -> [WIDTH, ROWS]: equally many rows in a row get each value."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], [WIDTH, PARTS, ROWS // PARTS]), [WIDTH, ROWS])
