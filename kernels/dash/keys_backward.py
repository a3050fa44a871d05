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

from dash_train.kernels.dash.attend_backward import MAX_KEYS
from dash_train.kernels.dash.inverse import Inverse
from dash_train.kernels.dash.lists import LOG2_E
from dash_train.kernels.dash.rows import tile_rows
from dash_train.kernels.dash.tiles import Lists, Segment, Shape

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
    pieces = _cut(inverse.counts, SLOTS)
    partial = torch.empty(SLOTS, 2, shape.chunk_size, shape.head_dim, device=q.device)
    keys = min(shape.chunk_size, MAX_KEYS)
    block_dim = triton.next_power_of_2(shape.head_dim)
    grid = (len(pieces.owners) + len(pieces.slots), shape.chunk_size // keys)
    rows = [1, shape.tile_tokens, shape.padded_group, block_dim]
    keys_backward_kernel[grid](
        TensorDescriptor.from_tensor(q, rows),
        k,
        v,
        lists.prior,
        inverse.entries,
        inverse.counts,
        *pieces,
        TensorDescriptor.from_tensor(dout, rows),
        lse,
        delta,
        dk,
        dv,
        partial,
        *k.stride()[:3],
        *v.stride()[:3],
        shape.q_len,
        shape.seq,
        shape.tiles(segment.tokens),
        segment.row,
        segment.position,
        segment.tokens,
        segment.chunks,
        len(pieces.owners),
        len(pieces.slots),
        shape.head_dim**-0.5,
        LOG2_E,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        TILE=shape.tile_tokens,
        CHUNK=shape.chunk_size,
        KEYS=keys,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=block_dim,
        STAGES=2 if block_dim * q.element_size() <= 256 else 1,
        num_warps=4 if block_dim <= 128 else 8,
    )
    add_slots_kernel[(len(pieces.slots), shape.chunk_size // 16)](
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


def _cut(counts: Tensor, slots: int) -> Pieces:
    """Pieces of at least MIN_PIECE tiles, few enough that all but every chunk's first fit into the slots."""
    counts = counts.flatten()
    length = ((counts.sum() + slots - 1) // slots).clamp(min=MIN_PIECE).int()
    taken = (counts - 1).clamp(min=0) // length
    end = taken.cumsum(0, dtype=torch.int32)
    slot = torch.arange(slots, dtype=torch.int32, device=counts.device)
    return Pieces(length, taken, end, torch.searchsorted(end, slot, right=True, out_int32=True))


@triton.jit
def keys_backward_kernel(
    q_tiles,
    k_ptr,
    v_ptr,
    prior_ptr,
    entries_ptr,
    counts_ptr,
    length_ptr,
    slots_ptr,
    slots_end_ptr,
    owners_ptr,
    dout_tiles,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    partial_ptr,
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
    capacity,
    slots,
    owners,
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
    sequence = (owner // capacity).to(tl.int64)  # batch * KV_HEADS + KV head
    chunk = owner % capacity
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS

    dim = tl.arange(0, BLOCK_DIM)
    in_dim = (dim < HEAD_DIM)[None, :]
    start = tl.program_id(1) * KEYS
    key = chunk * CHUNK + start + tl.arange(0, KEYS)
    mask = (key < seq)[:, None] & in_dim
    k_rows = k_ptr + batch * k_batch_stride + kv_head * k_head_stride + key.to(tl.int64) * k_token_stride
    v_rows = v_ptr + batch * v_batch_stride + kv_head * v_head_stride + key.to(tl.int64) * v_token_stride
    k = tl.load(k_rows[:, None] + dim[None, :], mask=mask, other=0.0)
    v = tl.load(v_rows[:, None] + dim[None, :], mask=mask, other=0.0)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)

    lse_ptr += batch * KV_HEADS * GROUP * q_len
    delta_ptr += batch * KV_HEADS * GROUP * q_len
    prior_ptr += sequence * tiles * capacity * TILE
    entries_ptr += owner.to(tl.int64) * tiles
    logit_scale = scale * log2_e

    # The chunk's own tokens, if the segment holds them: causal, no prior.
    own_tile = (chunk - first_position // CHUNK) * (CHUNK // TILE)
    if (piece == 0) & (own_tile >= 0):
        for tile in tl.range(own_tile, tl.minimum(own_tile + CHUNK // TILE, tiles), num_stages=1):
            token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
            is_seen = key[:, None] <= (first_position + token)[None, :]
            prior = tl.where(is_seen, 0.0, float("-inf"))
            per_head = head * q_len + first_row + token
            lse = tl.load(lse_ptr + per_head, mask=is_real, other=float("inf")) * log2_e
            delta = tl.load(delta_ptr + per_head, mask=is_real, other=0.0)
            place = [batch.to(tl.int32), first_row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
            q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
            dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
            dk, dv = _add_tile(dk, dv, q, k, v, dout, prior - lse[None, :], delta, logit_scale)
    for entry in tl.range(first_entry, last_entry, num_stages=STAGES):
        listed = tl.load(entries_ptr + entry)
        tile = listed // capacity
        token, head, is_real = tile_rows(tile, tokens, kv_head, GROUP, PADDED_GROUP, TILE)
        prior = tl.load(prior_ptr + listed.to(tl.int64) * TILE + tl.arange(0, TILE * PADDED_GROUP) // PADDED_GROUP)
        per_head = head * q_len + first_row + token
        lse = tl.load(lse_ptr + per_head, mask=is_real, other=float("inf")) * log2_e
        delta = tl.load(delta_ptr + per_head, mask=is_real, other=0.0)
        place = [batch.to(tl.int32), first_row + tile * TILE, kv_head.to(tl.int32) * GROUP, 0]
        q = q_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        dout = dout_tiles.load(place).reshape(TILE * PADDED_GROUP, BLOCK_DIM)
        dk, dv = _add_tile(dk, dv, q, k, v, dout, (prior - lse)[None, :], delta, logit_scale)

    dk *= scale
    in_chunk = start + tl.arange(0, KEYS)
    if slot < slots:
        offset = (slot.to(tl.int64) * 2 * CHUNK + in_chunk)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(partial_ptr + offset, dk, mask=in_dim)
        tl.store(partial_ptr + CHUNK * HEAD_DIM + offset, dv, mask=in_dim)
    else:
        offset = (sequence * seq + key)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(dk_ptr + offset, tl.load(dk_ptr + offset, mask=mask) + dk, mask=mask)
        tl.store(dv_ptr + offset, tl.load(dv_ptr + offset, mask=mask) + dv, mask=mask)


@triton.jit
def _add_tile(dk, dv, q, k, v, dout, shift, delta, logit_scale):
    """dk / scale and dv with one tile's share added. shift [KEYS or 1, rows]: log2(e) (log-prior - lse)."""
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * logit_scale + shift)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dlogits = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


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
