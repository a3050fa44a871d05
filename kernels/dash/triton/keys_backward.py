"""Gradients of stage 2 with respect to keys and values, in Triton: chunk by chunk over the tokens that attend to it.

A step is a tile's rows: those of a tile most of which is routed to the chunk, or as many rows of routing blocks named
one by one, gathered from wherever they stand. So few rows are spent on tokens that are not routed to the chunk,
whatever their neighbours do.

The steps of all chunks are cut into pieces of about equal work (pieces.py). docs/internals.md has the words: tile,
list, entry, inverse list, piece, slot.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import LOG2_E
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.triton.inverse import Inverse
from dash_train.kernels.dash.triton.pieces import add_slots, cut, new_slots
from dash_train.kernels.dash.triton.rows import keys_in_product, product_precision, tile_rows
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, Strides, strides_of


class Inputs(NamedTuple):
    """What both kernels read of every segment."""

    tensors: tuple[Any, ...]  # tiles of q and dout, k, v, lse, delta
    strides: tuple[Strides, Strides]  # of k and v
    constants: dict[str, Any]


def keys_backward_inputs(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, shape: Shape
) -> Inputs:
    """dout like q, contiguous; lse, delta [batch, kv_heads, q_len, group]."""
    block_dim = shape.block_dim
    rows = [1, shape.tile_tokens, shape.padded_group, block_dim]
    tiles = (TensorDescriptor.from_tensor(t, rows) for t in (q, dout))
    constants = {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "PADDED_GROUP": shape.padded_group,
        "TILE": shape.tile_tokens,
        "CHUNK": shape.chunk_size,
        "KEYS": keys_in_product(k, shape),
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": block_dim,
        "PRECISION": product_precision(shape),
        "STAGES": 2 if block_dim * q.element_size() <= 256 else 1,
        "num_warps": 4 if block_dim <= 128 else 8,
    }
    return Inputs((*tiles, k, v, lse, delta), (strides_of(k), strides_of(v)), constants)


def own_keys_segment(inputs: Inputs, shape: Shape, segment: Segment, dk: Tensor, dv: Tensor) -> None:
    """Writes what tokens pass to the keys of their own chunk: dk and dv [batch * kv_heads, seq, head_dim] fp32 of the
    chunks in which the segment's tokens are. To come before listed_keys_segment of any segment.
    """
    own_chunks = -(-segment.tokens // shape.chunk_size)
    launch(
        own_keys_kernel,
        (own_chunks, shape.chunk_size // inputs.constants["KEYS"], shape.batch * shape.kv_heads),
        *inputs.tensors,
        dk,
        dv,
        *inputs.strides,
        segment,
        shape.head_dim**-0.5,
        LOG2_E,
        **inputs.constants,
    )


def listed_keys_segment(
    inputs: Inputs,
    q: Tensor,
    dout: Tensor,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    inverse: Inverse,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Adds what a segment's tokens pass to the keys of their routed chunks to dk and dv; routing not counted."""
    partial = new_slots(shape, q.device)
    named = [(inverse.entry_counts, 1)]
    if shape.list_blocks > 1:
        named.append((inverse.block_counts, shape.list_blocks))
    for counts, unit in named:
        pieces = cut(counts, unit, shape)
        launch(
            listed_keys_kernel,
            (len(pieces.owners) + len(pieces.slots), shape.chunk_size // inputs.constants["KEYS"]),
            *inputs.tensors,
            dk,
            dv,
            q,
            dout,
            lists,
            inverse,
            counts,
            pieces,
            partial,
            len(pieces.owners),
            len(pieces.slots),
            strides_of(q),
            *inputs.strides,
            segment,
            shape.head_dim**-0.5,
            LOG2_E,
            ROUTING_BLOCK=shape.routing_block,
            BLOCKS=shape.list_blocks,
            TILES=shape.list_tiles,
            UNIT=unit,
            **inputs.constants | {"STAGES": _stages(unit, shape, q)},
        )
        add_slots(pieces, partial, dk, dv, shape, segment)


def _stages(unit: int, shape: Shape, q: Tensor) -> int:
    """Of the loop over listed keys: with 3 the numbers of rows are loaded one stage before the rows.

    That pays but where every row has its own log-prior and rows come a tile at a time.
    """
    if shape.block_dim * q.element_size() > 256:
        return 1
    return 2 if unit == 1 and shape.list_blocks > 1 else 3


@triton.jit
def own_keys_kernel(
    q_tiles,
    dout_tiles,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    k_strides,
    v_strides,
    segment,
    scale,
    log2_e,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program KEYS keys of a chunk in the segment, over the chunk's own tokens: dv = P^T dO, dk = a dS^T q.

    Causal, no prior.
    """
    chunk = segment.position // CHUNK + tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(2), KV_HEADS)

    # 1. The keys.
    key = chunk * CHUNK + tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    k_ptr += batch * k_strides.batch + kv_head * k_strides.head
    v_ptr += batch * v_strides.batch + kv_head * v_strides.head
    k = _load_keys(k_ptr, key, k_strides.token, segment.seq, HEAD_DIM, BLOCK_DIM)  # [KEYS, BLOCK_DIM]
    v = _load_keys(v_ptr, key, v_strides.token, segment.seq, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)

    # 2. Tile by tile.
    first = tl.program_id(0) * (CHUNK // TILE)
    for tile in tl.range(first, tl.minimum(first + CHUNK // TILE, tl.cdiv(segment.tokens, TILE)), num_stages=STAGES):
        token, head, is_real = tile_rows(tile, segment.tokens, kv_head, GROUP, PADDED_GROUP, TILE)
        is_seen = key[:, None] <= (segment.position + token)[None, :]  # [KEYS, ROWS]
        per_row = (batch_head * segment.q_len + segment.row + token) * GROUP + head - kv_head * GROUP
        lse = tl.load(lse_ptr + per_row, mask=is_real, other=float("inf")) * log2_e
        delta = tl.load(delta_ptr + per_row, mask=is_real, other=0.0)
        place = [batch.to(tl.int32), segment.row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
        q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)  # [ROWS, BLOCK_DIM]
        dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        shift = tl.where(is_seen, -lse[None, :], float("-inf"))
        dk, dv = _add_tile(dk, dv, q, k, v, dout, shift, delta, scale * log2_e, PRECISION)
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < segment.seq)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = (batch_head * segment.seq + key)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(dk_ptr + offset, dk * scale, mask=mask)
    tl.store(dv_ptr + offset, dv, mask=mask)


@triton.jit
def listed_keys_kernel(
    q_tiles,
    dout_tiles,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    dout_ptr,
    lists,
    inverse,
    counts_ptr,
    pieces,
    partial_ptr,
    slots,
    owners,
    q_strides,
    k_strides,
    v_strides,
    segment,
    scale,
    log2_e,
    ROUTING_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    UNIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a piece and KEYS keys: adds dv = P^T dO and dk = a dS^T q of the piece's tokens.

    The pieces that go to slots come first, then every chunk's first piece. A unit of a piece is a list as a whole, or
    with UNIT > 1 so many routing blocks named singly.
    """
    # 1. The piece: units begin .. end - 1 of the chunk `owner`.
    slot = tl.program_id(0)
    length = tl.load(pieces.length)
    owner = slot - slots
    piece = 0
    if slot < slots:
        owner = tl.load(pieces.owners + slot)
        if owner == owners:
            return
        piece = slot - tl.load(pieces.slots_end + owner) + tl.load(pieces.slots + owner) + 1
    begin = piece * length
    count = tl.load(counts_ptr + owner)
    end = tl.minimum(begin + length, tl.cdiv(count, UNIT))
    if begin >= end:
        return
    batch_head, batch, kv_head = batch_and_head(owner // segment.chunks, KV_HEADS)
    segment_lists = tl.cdiv(segment.tokens, TILE * TILES)

    # 2. The keys.
    in_chunk = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = (owner % segment.chunks) * CHUNK + in_chunk
    k_ptr += batch * k_strides.batch + kv_head * k_strides.head
    v_ptr += batch * v_strides.batch + kv_head * v_strides.head
    k = _load_keys(k_ptr, key, k_strides.token, segment.seq, HEAD_DIM, BLOCK_DIM)  # [KEYS, BLOCK_DIM]
    v = _load_keys(v_ptr, key, v_strides.token, segment.seq, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    row = tl.arange(0, TILE * PADDED_GROUP)

    # 3. The tiles of lists, or as many rows of single blocks.
    if UNIT == 1:
        entries_ptr = inverse.entries + owner.to(tl.int64) * segment_lists
        prior_ptr = lists.prior + batch_head * segment_lists * segment.chunks * BLOCKS
        if BLOCKS > 1:
            prior_ptr += row // (ROUTING_BLOCK * PADDED_GROUP)
        for step in tl.range(begin * TILES, end * TILES, num_stages=STAGES):
            entry = tl.load(entries_ptr + step // TILES)
            tile = entry // segment.chunks * TILES + step % TILES
            prior = tl.load(prior_ptr + entry.to(tl.int64) * BLOCKS)  # one, or [ROWS]
            token, head, is_real = tile_rows(tile, segment.tokens, kv_head, GROUP, PADDED_GROUP, TILE)
            per_row = (batch_head * segment.q_len + segment.row + token) * GROUP + head - kv_head * GROUP
            lse = tl.load(lse_ptr + per_row, mask=is_real, other=float("inf")) * log2_e
            delta = tl.load(delta_ptr + per_row, mask=is_real, other=0.0)
            place = [batch.to(tl.int32), segment.row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
            q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)  # [ROWS, BLOCK_DIM]
            dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
            dk, dv = _add_tile(dk, dv, q, k, v, dout, (prior - lse)[None, :], delta, scale * log2_e, PRECISION)
    else:
        singles_start = owner.to(tl.int64) * segment_lists * (BLOCKS // 2)
        dim = tl.arange(0, BLOCK_DIM)
        in_dim = (dim < HEAD_DIM)[None, :]
        head = kv_head * GROUP + row % PADDED_GROUP
        lse_ptr += (batch_head * segment.q_len + segment.row) * GROUP + row % PADDED_GROUP
        delta_ptr += (batch_head * segment.q_len + segment.row) * GROUP + row % PADDED_GROUP
        q_ptr += batch * q_strides.batch + head[:, None] * q_strides.head + dim[None, :]
        dout_ptr += (batch * segment.q_len * KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
        for step in tl.range(begin, end, num_stages=STAGES):
            single = step * UNIT + row // (ROUTING_BLOCK * PADDED_GROUP)  # [ROWS]
            block = tl.load(inverse.blocks + singles_start + single, mask=single < count, other=0)
            prior = tl.load(inverse.priors + singles_start + single, mask=single < count, other=float("-inf"))
            token = block * ROUTING_BLOCK + row // PADDED_GROUP % ROUTING_BLOCK
            is_real = (single < count) & (token < segment.tokens) & (row % PADDED_GROUP < GROUP)
            lse = tl.load(lse_ptr + token * GROUP, mask=is_real, other=float("inf")) * log2_e
            delta = tl.load(delta_ptr + token * GROUP, mask=is_real, other=0.0)
            token_row = (segment.row + token).to(tl.int64)[:, None]
            mask = is_real[:, None] & in_dim
            q = tl.load(q_ptr + token_row * q_strides.token, mask=mask, other=0.0)  # [ROWS, BLOCK_DIM]
            dout = tl.load(dout_ptr + token_row * (KV_HEADS * GROUP * HEAD_DIM), mask=mask, other=0.0)
            dk, dv = _add_tile(dk, dv, q, k, v, dout, (prior - lse)[None, :], delta, scale * log2_e, PRECISION)

    # 4. To the piece's slot, or to the gradients.
    dk *= scale
    if slot < slots:
        dim = tl.arange(0, BLOCK_DIM)
        in_dim = (dim < HEAD_DIM)[None, :]
        offset = (slot.to(tl.int64) * 2 * CHUNK + in_chunk)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(partial_ptr + offset, dk, mask=in_dim)
        tl.store(partial_ptr + CHUNK * HEAD_DIM + offset, dv, mask=in_dim)
    else:
        _add_to(dk_ptr, dk, batch_head, key, segment.seq, HEAD_DIM, BLOCK_DIM)
        _add_to(dv_ptr, dv, batch_head, key, segment.seq, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _load_keys(rows, key, stride, seq, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[KEYS, BLOCK_DIM], through registers into shared memory: what TMA brings would stay in registers."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < seq)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(rows + key.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _add_tile(dk, dv, q, k, v, dout, shift, delta, logit_scale, PRECISION: tl.constexpr):
    """dk / scale and dv [KEYS, BLOCK_DIM] with the share of ROWS rows added.

    q, dout [ROWS, BLOCK_DIM]; delta [ROWS]; shift [KEYS or 1, ROWS]: log2(e) (log-prior - lse).
    """
    # [KEYS, ROWS]
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * logit_scale + shift)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dlogits = weights * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _add_to(total_ptr, share, batch_head, key, seq, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Adds a share [KEYS, BLOCK_DIM] to rows of dk or dv, in place."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < seq)[:, None] & (dim < HEAD_DIM)[None, :]
    total_ptr += (batch_head * seq + key)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(total_ptr, tl.load(total_ptr, mask=mask) + share, mask=mask)
