"""Gradients of stage 2 with respect to keys and values, in Triton: chunk by chunk over the tiles that list it.

The tiles of all chunks are cut into pieces of about equal work, so that a chunk to which everyone attends does not keep
one program busy alone. A chunk's first piece adds to the result; the others go to slots of a fixed number, and are
added afterwards, in order: no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_train.kernels.dash.inverse import Inverse
from dash_train.kernels.dash.lists import LOG2_E
from dash_train.kernels.dash.rows import keys_in_product, product_precision, tile_rows
from dash_train.kernels.dash.tiles import Lists, Segment, Shape
from dash_train.kernels.launch import launch

SLOTS = 1024  # 64 MiB at chunk_size 64 and head_dim 128
MIN_PIECE = 64  # tiles


class Pieces(NamedTuple):
    """How the inverse lists are cut. A chunk's number counts all sequences: sequence * segment.chunks + chunk."""

    length: Tensor  # scalar int32: tiles in a piece
    slots: Tensor  # [chunks of all sequences] int32: how many slots each takes
    slots_end: Tensor  # the same size: the slots of all chunks up to this one
    owners: Tensor  # [slots] int32: the chunk whose piece goes there, or their number where none does


def keys_backward_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    inverse: Inverse,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Adds a segment's share to dk and dv [batch * kv_heads, seq, head_dim] fp32; routing not counted.

    dout like q, contiguous; lse, delta [batch, heads, q_len].
    """
    pieces = _cut(inverse.counts)
    partial = torch.empty(SLOTS, 2, shape.chunk_size, shape.head_dim, device=q.device)
    keys = keys_in_product(k, shape)
    block_dim = shape.block_dim
    rows = [1, shape.tile_tokens, shape.padded_group, block_dim]
    inputs = (
        TensorDescriptor.from_tensor(q, rows),
        TensorDescriptor.from_tensor(dout, rows),
        k,
        v,
        lse,
        delta,
    )
    strides = (*k.stride()[:3], *v.stride()[:3])
    sizes = (shape.q_len, shape.seq, shape.tiles(segment.tokens), *segment, shape.head_dim**-0.5, LOG2_E)
    common = {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "PADDED_GROUP": shape.padded_group,
        "TILE": shape.tile_tokens,
        "CHUNK": shape.chunk_size,
        "KEYS": keys,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": block_dim,
        "PRECISION": product_precision(shape),
        "STAGES": 2 if block_dim * q.element_size() <= 256 else 1,
        "num_warps": 4 if block_dim <= 128 else 8,
    }
    sequences = shape.batch * shape.kv_heads
    own_chunks = -(-segment.tokens // shape.chunk_size)
    launch(
        own_keys_kernel, (own_chunks, shape.chunk_size // keys, sequences), *inputs, dk, dv, *strides, *sizes, **common
    )
    launch(
        listed_keys_kernel,
        (len(pieces.owners) + len(pieces.slots), shape.chunk_size // keys),
        *inputs,
        dk,
        dv,
        lists.prior,
        inverse.entries,
        inverse.counts,
        *pieces,
        partial,
        len(pieces.owners),
        len(pieces.slots),
        *strides,
        *sizes,
        **common,
    )
    launch(
        add_slots_kernel,
        (len(pieces.slots), shape.chunk_size // 16),
        pieces.slots,
        pieces.slots_end,
        dk,
        dv,
        partial,
        shape.seq,
        segment.chunks,
        CHUNK=shape.chunk_size,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=block_dim,
    )


def _cut(counts: Tensor) -> Pieces:
    """Pieces of at least MIN_PIECE tiles, few enough that all but every chunk's first fit into the slots."""
    pieces = Pieces(
        length=counts.new_empty(()),
        slots=counts.new_empty(counts.numel()),
        slots_end=counts.new_empty(counts.numel()),
        owners=counts.new_empty(SLOTS),
    )
    chunks = counts.numel()
    launch(
        cut_kernel, (1,), counts, *pieces, chunks, chunks.bit_length(), MIN_PIECE=MIN_PIECE, SLOTS=SLOTS, num_warps=8
    )
    return pieces


@triton.jit
def cut_kernel(
    counts_ptr,
    length_ptr,
    slots_ptr,
    slots_end_ptr,
    owners_ptr,
    chunks,
    steps,
    MIN_PIECE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: the length of a piece, the slots of each chunk, and by bisection the chunk of each slot."""
    lane = tl.arange(0, SLOTS)
    total = 0
    for block in range(0, chunks, SLOTS):
        total += tl.sum(tl.load(counts_ptr + block + lane, mask=block + lane < chunks, other=0), 0)
    length = tl.maximum(tl.cdiv(total, SLOTS), MIN_PIECE)
    tl.store(length_ptr, length)
    end = 0
    for block in range(0, chunks, SLOTS):
        in_chunks = block + lane < chunks
        count = tl.load(counts_ptr + block + lane, mask=in_chunks, other=0)
        slots = tl.maximum(count - 1, 0) // length
        tl.store(slots_ptr + block + lane, slots, mask=in_chunks)
        tl.store(slots_end_ptr + block + lane, end + tl.cumsum(slots, 0), mask=in_chunks)
        end += tl.sum(slots, 0)
    tl.debug_barrier()  # every thread reads what all have written
    low = tl.zeros([SLOTS], tl.int32)
    high = low + chunks
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = tl.load(slots_end_ptr + middle, mask=is_open, other=0) <= lane
        low = tl.where(is_open & is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    tl.store(owners_ptr + lane, low)


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
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    q_len,
    seq,
    tiles,
    first_row,
    first_position,
    tokens,
    first_tile,
    capacity,
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
    """One program KEYS keys of a chunk in the segment, over the chunk's own tokens: causal, no prior."""
    chunk = first_position // CHUNK + tl.program_id(0)
    sequence = tl.program_id(2).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    key = chunk * CHUNK + tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    k = _load_keys(k_ptr, key, k_token_stride, seq, HEAD_DIM, BLOCK_DIM)
    v = _load_keys(v_ptr, key, v_token_stride, seq, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    first = tl.program_id(0) * (CHUNK // TILE)
    for tile in tl.range(first, tl.minimum(first + CHUNK // TILE, tiles), num_stages=STAGES):
        token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
        is_seen = key[:, None] <= (first_position + token)[None, :]
        per_head = (batch * KV_HEADS * GROUP + head) * q_len + first_row + token
        lse = tl.load(lse_ptr + per_head, mask=is_real, other=float("inf")) * log2_e
        delta = tl.load(delta_ptr + per_head, mask=is_real, other=0.0)
        place = [batch.to(tl.int32), first_row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
        q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        shift = tl.where(is_seen, -lse[None, :], float("-inf"))
        dk, dv = _add_tile(dk, dv, q, k, v, dout, shift, delta, scale * log2_e, PRECISION)
    _add_to(dk_ptr, dk * scale, sequence, key, seq, HEAD_DIM, BLOCK_DIM)
    _add_to(dv_ptr, dv, sequence, key, seq, HEAD_DIM, BLOCK_DIM)


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
    prior_ptr,
    entries_ptr,
    counts_ptr,
    length_ptr,
    slots_ptr,
    slots_end_ptr,
    owners_ptr,
    partial_ptr,
    slots,
    owners,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    q_len,
    seq,
    tiles,
    first_row,
    first_position,
    tokens,
    first_tile,
    capacity,
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
    """One program a piece and KEYS keys: the pieces that go to slots, then every chunk's first."""
    slot = tl.program_id(0)
    length = tl.load(length_ptr)
    owner = slot - slots
    piece = 0
    if slot < slots:
        owner = tl.load(owners_ptr + slot)
        if owner == owners:
            return
        piece = slot - tl.load(slots_end_ptr + owner) + tl.load(slots_ptr + owner) + 1
    first_entry = piece * length
    last_entry = tl.minimum(first_entry + length, tl.load(counts_ptr + owner))
    if first_entry >= last_entry:
        return
    sequence = (owner // capacity).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    in_chunk = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = (owner % capacity) * CHUNK + in_chunk
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    k = _load_keys(k_ptr, key, k_token_stride, seq, HEAD_DIM, BLOCK_DIM)
    v = _load_keys(v_ptr, key, v_token_stride, seq, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    entries_ptr += owner.to(tl.int64) * tiles
    prior_ptr += sequence * tiles * capacity * TILE + tl.arange(0, TILE * PADDED_GROUP) // PADDED_GROUP
    for entry in tl.range(first_entry, last_entry, num_stages=STAGES):
        listed = tl.load(entries_ptr + entry)
        tile = listed // capacity
        prior = tl.load(prior_ptr + listed.to(tl.int64) * TILE)
        token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
        per_head = (batch * KV_HEADS * GROUP + head) * q_len + first_row + token
        lse = tl.load(lse_ptr + per_head, mask=is_real, other=float("inf")) * log2_e
        delta = tl.load(delta_ptr + per_head, mask=is_real, other=0.0)
        place = [batch.to(tl.int32), first_row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
        q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        dk, dv = _add_tile(dk, dv, q, k, v, dout, (prior - lse)[None, :], delta, scale * log2_e, PRECISION)
    dk *= scale
    if slot < slots:
        dim = tl.arange(0, BLOCK_DIM)
        in_dim = (dim < HEAD_DIM)[None, :]
        offset = (slot.to(tl.int64) * 2 * CHUNK + in_chunk)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(partial_ptr + offset, dk, mask=in_dim)
        tl.store(partial_ptr + CHUNK * HEAD_DIM + offset, dv, mask=in_dim)
    else:
        _add_to(dk_ptr, dk, sequence, key, seq, HEAD_DIM, BLOCK_DIM)
        _add_to(dv_ptr, dv, sequence, key, seq, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _load_keys(rows, key, stride, seq, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Through registers into shared memory; what the copy engine brings would stay in registers, which are scarce."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < seq)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(rows + key.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _add_tile(dk, dv, q, k, v, dout, shift, delta, logit_scale, PRECISION: tl.constexpr):
    """dk / scale and dv with one tile's share added. shift [KEYS or 1, rows]: log2(e) (log-prior - lse)."""
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * logit_scale + shift)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dlogits = weights * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _add_to(total_ptr, share, sequence, key, seq, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < seq)[:, None] & (dim < HEAD_DIM)[None, :]
    total_ptr += (sequence * seq + key)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(total_ptr, tl.load(total_ptr, mask=mask) + share, mask=mask)


@triton.jit
def add_slots_kernel(
    slots_ptr,
    slots_end_ptr,
    dk_ptr,
    dv_ptr,
    partial_ptr,
    seq,
    capacity,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program 16 keys of a chunk."""
    owner = tl.program_id(0)
    slots = tl.load(slots_ptr + owner)
    if slots == 0:
        return
    in_chunk = tl.program_id(1) * 16 + tl.arange(0, 16)
    key = (owner % capacity) * CHUNK + in_chunk
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < seq)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = ((owner // capacity).to(tl.int64) * seq + key)[:, None] * HEAD_DIM + dim[None, :]
    dk = tl.load(dk_ptr + offset, mask=mask)
    dv = tl.load(dv_ptr + offset, mask=mask)
    end = tl.load(slots_end_ptr + owner)
    for slot in range(end - slots, end):
        part = partial_ptr + (slot * 2 * CHUNK + in_chunk).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        dk += tl.load(part, mask=mask)
        dv += tl.load(part + CHUNK * HEAD_DIM, mask=mask)
    tl.store(dk_ptr + offset, dk, mask=mask)
    tl.store(dv_ptr + offset, dv, mask=mask)
