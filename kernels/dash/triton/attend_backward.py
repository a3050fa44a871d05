"""Gradients of stage 2 with respect to queries and log-priors, in Triton, over the forward pass's lists.

docs/internals.md has the words: tile, list, entry, segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import LOG2_E, power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.triton.rows import keys_in_product, product_precision, tile_rows
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, strides_of


def row_deltas(out: Tensor, dout: Tensor, lse: Tensor) -> Tensor:
    """delta = out.dout of every row, like lse; both contiguous [batch, q_len, heads, head_dim]."""
    batch, q_len, heads, head_dim = out.shape
    delta = torch.empty_like(lse)
    rows = 64
    launch(
        delta_kernel,
        (-(-q_len * heads // rows), batch),
        out,
        dout,
        delta,
        q_len,
        HEADS=heads,
        GROUP=lse.shape[3],
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        ROWS=rows,
    )
    return delta


def attend_backward_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    lengths: Tensor,
    g: Tensor,
    dq: Tensor,
) -> None:
    """Writes a segment's rows of dq (like q, contiguous), routing not counted, and g_c of every entry of `lists`.

    dout like q, contiguous; lse, delta [batch, kv_heads, q_len, group]; lengths [batch, kv_heads, lists] of the lists.
    g fp32, like lists.prior and possibly the same, or where several tiles share a list [..., list_tiles]: each tile's.
    """
    keys = keys_in_product(k, shape)
    block = [1, keys, 1, shape.block_dim]
    launch(
        attend_backward_kernel,
        (shape.lists(segment.tokens) * shape.list_tiles, shape.batch * shape.kv_heads),  # tiles past the end add g = 0
        q,
        TensorDescriptor.from_tensor(k, block),
        TensorDescriptor.from_tensor(v, block),
        lists,
        lengths,
        dout,
        lse,
        delta,
        g,
        dq,
        strides_of(q),
        segment,
        shape.head_dim**-0.5,
        LOG2_E,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        TILE=shape.tile_tokens,
        TILES=shape.list_tiles,
        BLOCKS=shape.list_blocks,
        CHUNK=shape.chunk_size,
        KEYS=keys,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=block[-1],
        PRECISION=product_precision(shape),
        STAGES=3 if block[-1] <= 128 else 2,
        num_warps=4 if block[-1] <= 128 else 8,
    )


@triton.jit
def delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    q_len,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program ROWS rows of a batch row: delta = sum over dimensions of out dout."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # token * HEADS + head
    dim = tl.arange(0, BLOCK_DIM)
    is_row = row < q_len * HEADS
    mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    offset = (batch * q_len * HEADS + row)[:, None] * HEAD_DIM + dim[None, :]
    out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_DIM]
    dout = tl.load(dout_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    batch_head = batch * (HEADS // GROUP) + row % HEADS // GROUP
    place = (batch_head * q_len + row // HEADS) * GROUP + row % GROUP
    tl.store(delta_ptr + place, tl.sum(out * dout, 1), mask=is_row)


@triton.jit
def attend_backward_kernel(
    q_ptr,
    k_tiles,
    v_tiles,
    lists,
    lengths_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    g_ptr,
    dq_ptr,
    q_strides,
    segment,
    scale,
    log2_e,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a tile, the longest histories first: dS = P (dO V^T - delta), dq = a dS K, g_c = sum of dS over c.

    P = 2^(logits - lse), as in the forward pass. An entry's log-prior is read, then its g written.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)

    # 1. The tile's rows.
    token, head, is_real = tile_rows(tile, segment.tokens, kv_head, GROUP, PADDED_GROUP, TILE)
    dim = tl.arange(0, BLOCK_DIM)
    mask = is_real[:, None] & (dim < HEAD_DIM)[None, :]
    q_rows = (
        q_ptr + batch * q_strides.batch + (segment.row + token).to(tl.int64) * q_strides.token + head * q_strides.head
    )
    rows = ((batch * segment.q_len + segment.row + token) * HEADS + head) * HEAD_DIM
    q = tl.load(q_rows[:, None] + dim[None, :], mask=mask, other=0.0)  # [ROWS, BLOCK_DIM]
    dout = tl.load(dout_ptr + rows[:, None] + dim[None, :], mask=mask, other=0.0)
    q = tl.where(is_real[:, None], q, 0.0)  # keeps both in registers, as in the forward pass
    dout = tl.where(is_real[:, None], dout, 0.0)
    per_row = (batch_head * segment.q_len + segment.row + token) * GROUP + head - kv_head * GROUP
    lse = tl.load(lse_ptr + per_row, mask=is_real, other=float("inf")) * log2_e  # [ROWS]
    delta = tl.load(delta_ptr + per_row, mask=is_real, other=0.0)

    # 2. The own chunk: causal, no prior.
    own = (segment.position + tile * TILE) // CHUNK
    k_head = kv_head.to(tl.int32)
    k_batch = batch.to(tl.int32)
    logit_scale = scale * log2_e
    dq = tl.zeros([TILE * PADDED_GROUP, BLOCK_DIM], tl.float32)
    for start in tl.range(0, CHUNK, KEYS, num_stages=1):
        k = k_tiles.load([k_batch, own * CHUNK + start, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([k_batch, own * CHUNK + start, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        is_seen = (own * CHUNK + start + tl.arange(0, KEYS))[None, :] <= (segment.position + token)[:, None]
        # [ROWS, KEYS]
        logits = tl.where(is_seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_scale, float("-inf"))
        dlogits = tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        dlogits *= tl.exp2(logits - lse[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)

    # 3. The routed chunks.
    own_list = tile // TILES
    list_start = (batch_head * tl.num_programs(0) // TILES + own_list) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    prior_ptr = lists.prior + list_start * BLOCKS
    if BLOCKS > 1:
        prior_ptr += tl.arange(0, TILE * PADDED_GROUP) // (TILE // BLOCKS * PADDED_GROUP)
        g_ptr += list_start * BLOCKS + tl.arange(0, BLOCKS)
    else:
        g_ptr += list_start * TILES + tile % TILES
    length = tl.load(lengths_ptr + batch_head * segment.row_lists + segment.list + own_list)
    STEPS: tl.constexpr = CHUNK // KEYS
    g = tl.zeros([TILE * PADDED_GROUP], tl.float32)
    for step in tl.range(0, length * STEPS, num_stages=STAGES):
        entry = step // STEPS
        start = tl.load(chunks_ptr + entry) * CHUNK + step % STEPS * KEYS
        shift = tl.load(prior_ptr + entry * BLOCKS) - lse  # [ROWS]
        k = k_tiles.load([k_batch, start, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([k_batch, start, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dlogits = tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        dlogits *= tl.exp2(logits * logit_scale + shift[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
        g = tl.where(step % STEPS == 0, 0.0, g) + tl.sum(dlogits, 1)
        if step % STEPS == STEPS - 1:
            if BLOCKS > 1:
                tl.store(g_ptr + entry * BLOCKS, tl.sum(tl.reshape(g, [BLOCKS, TILE // BLOCKS * PADDED_GROUP]), 1))
            else:
                tl.store(g_ptr + entry * TILES, tl.sum(g, 0))
    tl.store(dq_ptr + rows[:, None] + dim[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
