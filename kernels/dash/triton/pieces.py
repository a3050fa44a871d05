"""How the work on chunks of keys is cut into pieces of about equal size, and their results added up, in Triton.

A chunk to which everyone attends shall not keep one program busy alone. A chunk's first piece adds to the result; the
others go to slots of a fixed number, and are added afterwards, in order: no atomics, the same bits every time.
docs/internals.md has the words: piece, slot, list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.search import first_at_least
from dash_train.kernels.dash.triton.tiles import Segment, Shape

SLOTS = 1024  # 64 MiB at chunk_size 64 and head_dim 128
MIN_PIECE = 64  # tiles


class Pieces(NamedTuple):
    """How inverse lists are cut. A chunk's number counts all KV heads: batch_head * segment.chunks + chunk.

    Their unit is a list, or as many routing blocks as a list has.
    """

    length: Tensor  # scalar int32: units in a piece
    slots: Tensor  # [chunks of all KV heads] int32: how many slots each takes
    slots_end: Tensor  # the same size: the slots of all chunks up to this one
    owners: Tensor  # [slots] int32: the chunk whose piece goes there, or their number where none does


def cut(counts: Tensor, unit: int, shape: Shape) -> Pieces:
    """Pieces of at least MIN_PIECE tiles, so few that all but every chunk's first fit into the slots.

    counts [batch * kv_heads, chunks], of which `unit` are a unit of work.
    """
    pieces = Pieces(
        length=counts.new_empty(()),
        slots=counts.new_empty(counts.numel()),
        slots_end=counts.new_empty(counts.numel()),
        owners=counts.new_empty(SLOTS),
    )
    chunks = counts.numel()
    launch(
        cut_kernel,
        (1,),
        counts,
        pieces,
        chunks,
        chunks.bit_length(),
        MIN_PIECE=max(1, MIN_PIECE // shape.list_tiles),
        UNIT=unit,
        SLOTS=SLOTS,
        num_warps=8,
    )
    return pieces


def new_slots(shape: Shape, device: torch.device) -> Tensor:
    """Room for the partial dk and dv of SLOTS pieces, [SLOTS, 2, chunk_size, head_dim] fp32, not yet written."""
    return torch.empty(SLOTS, 2, shape.chunk_size, shape.head_dim, device=device)


def add_slots(pieces: Pieces, partial: Tensor, dk: Tensor, dv: Tensor, shape: Shape, segment: Segment) -> None:
    """Adds what pieces left in the slots of new_slots to dk and dv."""
    launch(
        add_slots_kernel,
        (len(pieces.slots), shape.chunk_size // 16),
        pieces,
        dk,
        dv,
        partial,
        segment,
        CHUNK=shape.chunk_size,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=shape.block_dim,
    )


@triton.jit
def cut_kernel(
    counts_ptr,
    pieces,
    chunks,
    steps,
    MIN_PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: length = max(all units / SLOTS, MIN_PIECE); each chunk's pieces but the first get slots."""
    lane = tl.arange(0, SLOTS)

    # 1. The length of a piece.
    total = 0
    for block in range(0, chunks, SLOTS):
        count = tl.load(counts_ptr + block + lane, mask=block + lane < chunks, other=0)
        total += tl.sum(tl.cdiv(count, UNIT), 0)
    length = tl.maximum(tl.cdiv(total, SLOTS), MIN_PIECE)
    tl.store(pieces.length, length)

    # 2. The slots of each chunk, one after the other.
    end = 0
    for block in range(0, chunks, SLOTS):
        in_chunks = block + lane < chunks
        count = tl.load(counts_ptr + block + lane, mask=in_chunks, other=0)
        slots = tl.maximum(tl.cdiv(count, UNIT) - 1, 0) // length
        tl.store(pieces.slots + block + lane, slots, mask=in_chunks)
        tl.store(pieces.slots_end + block + lane, end + tl.cumsum(slots, 0), mask=in_chunks)
        end += tl.sum(slots, 0)
    tl.debug_barrier()  # every thread reads what all have written

    # 3. The chunk of each slot.
    tl.store(
        pieces.owners + lane, first_at_least(pieces.slots_end, tl.zeros([SLOTS], tl.int32) + chunks, lane + 1, steps)
    )


@triton.jit
def add_slots_kernel(
    pieces,
    dk_ptr,
    dv_ptr,
    partial_ptr,
    segment,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program 16 keys of a chunk: dk and dv plus the sums in the chunk's slots, in order."""
    owner = tl.program_id(0)
    slots = tl.load(pieces.slots + owner)
    if slots == 0:
        return
    in_chunk = tl.program_id(1) * 16 + tl.arange(0, 16)
    key = (owner % segment.chunks) * CHUNK + in_chunk
    dim = tl.arange(0, BLOCK_DIM)
    mask = (key < segment.seq)[:, None] & (dim < HEAD_DIM)[None, :]
    # [16, BLOCK_DIM] each.
    offset = ((owner // segment.chunks).to(tl.int64) * segment.seq + key)[:, None] * HEAD_DIM + dim[None, :]
    dk = tl.load(dk_ptr + offset, mask=mask)
    dv = tl.load(dv_ptr + offset, mask=mask)
    end = tl.load(pieces.slots_end + owner)
    for slot in range(end - slots, end):
        part = partial_ptr + (slot * 2 * CHUNK + in_chunk).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        dk += tl.load(part, mask=mask)
        dv += tl.load(part + CHUNK * HEAD_DIM, mask=mask)
    tl.store(dk_ptr + offset, dk, mask=mask)
    tl.store(dv_ptr + offset, dv, mask=mask)
