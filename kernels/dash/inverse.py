"""From tiles to chunks, in Triton: for every chunk the tiles that list it, which the gradients of keys walk.

Every (chunk, tile) pair is looked up by bisection, since lists ascend. That needs neither a sort nor atomics nor a
matrix of all pairs, and gives the tiles in order, so sums over them are the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.tiles import Lists, Segment, Shape, power_of_two
from dash_train.kernels.launch import launch


class Inverse(NamedTuple):
    """The lists of one segment, by chunk."""

    entries: Tensor  # [batch * kv_heads, chunks, tiles] int32: tile * segment.chunks + place in its list, ascending
    counts: Tensor  # [batch * kv_heads, chunks] int32: how many of them


def invert_lists(shape: Shape, segment: Segment, lists: Lists, lengths: Tensor) -> Inverse:
    """The inverse of a segment's lists, of the lengths [batch, kv_heads, tiles of the call]."""
    sequences, tiles = shape.batch * shape.kv_heads, shape.tiles(segment.tokens)
    empty = torch.empty
    inverse = Inverse(
        entries=empty(sequences, segment.chunks, tiles, dtype=torch.int32, device=lengths.device),
        counts=empty(sequences, segment.chunks, dtype=torch.int32, device=lengths.device),
    )
    launch(
        invert_kernel,
        (segment.chunks, sequences),
        lists.chunks,
        lengths,
        *inverse,
        lengths.shape[2],
        segment.position // shape.chunk_size,
        segment.tile,
        tiles,
        segment.chunks,
        segment.chunks.bit_length(),
        TILES_IN_CHUNK=shape.chunk_size // shape.tile_tokens,
        BLOCK=min(1024, power_of_two(tiles)),
        num_warps=8,
    )
    return inverse


@triton.jit
def invert_kernel(
    chunks_ptr,
    lengths_ptr,
    entries_ptr,
    counts_ptr,
    row_tiles,
    first_chunk,
    first_tile,
    tiles,
    capacity,
    steps,
    TILES_IN_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk: only tiles of later chunks can list it."""
    chunk = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    chunks_ptr += sequence * tiles * capacity
    lengths_ptr += sequence * row_tiles + first_tile
    entries_ptr += (sequence * capacity + chunk) * tiles

    count = 0
    for block in range(tl.maximum(chunk + 1 - first_chunk, 0) * TILES_IN_CHUNK, tiles, BLOCK):
        tile = block + tl.arange(0, BLOCK)
        is_tile = tile < tiles
        length = tl.load(lengths_ptr + tile, mask=is_tile, other=0)
        tile_list = chunks_ptr + tile.to(tl.int64) * capacity
        low = tl.zeros([BLOCK], tl.int32)
        high = length
        for _ in range(steps):
            middle = (low + high) // 2
            is_open = low < high
            is_before = tl.load(tile_list + middle, mask=is_open, other=0) < chunk
            low = tl.where(is_open & is_before, middle + 1, low)
            high = tl.where(is_open & (is_before == 0), middle, high)
        is_listed = tl.load(tile_list + low, mask=low < length, other=-1) == chunk
        place = count + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        tl.store(entries_ptr + place, tile * capacity + low, mask=is_listed)
        count += tl.sum(is_listed.to(tl.int32), 0)
    tl.store(counts_ptr + sequence * capacity + chunk, count)
