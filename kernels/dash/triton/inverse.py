"""From lists to chunks, in Triton: for every chunk the tokens that attend to it, which dk and dv walk.

Every (chunk, list) pair is looked up by bisection, since lists ascend. Where several routing blocks share a list, and
at most half of them are routed to the chunk, these are named one by one; else the list is named as a whole. That needs
neither a sort nor atomics nor a matrix of all pairs, and gives the tokens in order, so sums over them are the same bits
every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, power_of_two


class Inverse(NamedTuple):
    """The lists of one segment, by chunk: [batch * kv_heads, chunks, ...]."""

    entries: Tensor  # [..., lists] int32: list * segment.chunks + place in it, of the lists that are named as a whole
    blocks: Tensor  # [..., singles] int32: the routing blocks that are named singly, counted within the segment
    priors: Tensor  # [..., singles] fp32: their log-priors
    entry_counts: Tensor  # [...] int32
    block_counts: Tensor  # [...] int32


def invert_lists(shape: Shape, segment: Segment, lists: Lists, lengths: Tensor) -> Inverse:
    """The inverse of a segment's lists, of the lengths [batch, kv_heads, lists of the call]."""
    size = (shape.batch * shape.kv_heads, segment.chunks)
    segment_lists = shape.lists(segment.tokens)
    singles = segment_lists * (shape.list_blocks // 2)
    inverse = Inverse(
        entries=torch.empty(*size, segment_lists, dtype=torch.int32, device=lengths.device),
        blocks=torch.empty(*size, singles, dtype=torch.int32, device=lengths.device),
        priors=torch.empty(*size, singles, device=lengths.device),
        entry_counts=torch.empty(size, dtype=torch.int32, device=lengths.device),
        block_counts=torch.empty(size, dtype=torch.int32, device=lengths.device),
    )
    launch(
        invert_kernel,
        (segment.chunks, size[0]),
        *lists,
        lengths,
        *inverse,
        lengths.shape[2],
        segment.position // shape.chunk_size,
        segment.list,
        segment_lists,
        segment.chunks,
        segment.chunks.bit_length(),
        CHUNK_LISTS=shape.chunk_size // shape.list_tokens,
        BLOCKS=shape.list_blocks,
        WIDTH=min(max(64, 1024 // shape.list_blocks), power_of_two(segment_lists)),
        num_warps=8,
    )
    return inverse


@triton.jit
def invert_kernel(
    chunks_ptr,
    prior_ptr,
    lengths_ptr,
    entries_ptr,
    blocks_ptr,
    priors_ptr,
    entry_counts_ptr,
    block_counts_ptr,
    row_lists,
    first_chunk,
    first_list,
    lists,
    capacity,
    steps,
    CHUNK_LISTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a chunk: only lists of later chunks can name it."""
    chunk = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    owner = sequence * capacity + chunk
    chunks_ptr += sequence * lists * capacity
    prior_ptr += sequence * lists * capacity * BLOCKS
    lengths_ptr += sequence * row_lists + first_list
    entries_ptr += owner * lists
    blocks_ptr += owner * lists * (BLOCKS // 2)
    priors_ptr += owner * lists * (BLOCKS // 2)
    in_list = tl.arange(0, BLOCKS)[None, :]

    entry_count = 0
    block_count = 0
    for start in range(tl.maximum(chunk + 1 - first_chunk, 0) * CHUNK_LISTS, lists, WIDTH):
        own_list = start + tl.arange(0, WIDTH)
        length = tl.load(lengths_ptr + own_list, mask=own_list < lists, other=0)
        own_chunks = chunks_ptr + own_list.to(tl.int64) * capacity
        low = tl.zeros([WIDTH], tl.int32)
        high = length
        for _ in range(steps):
            middle = (low + high) // 2
            is_open = low < high
            is_before = tl.load(own_chunks + middle, mask=is_open, other=0) < chunk
            low = tl.where(is_open & is_before, middle + 1, low)
            high = tl.where(is_open & (is_before == 0), middle, high)
        is_whole = tl.load(own_chunks + low, mask=low < length, other=-1) == chunk
        entry = own_list * capacity + low
        if BLOCKS > 1:
            prior_place = prior_ptr + (entry.to(tl.int64) * BLOCKS)[:, None] + in_list
            prior = tl.load(prior_place, mask=is_whole[:, None], other=float("-inf"))
            routed = (prior > float("-inf")).to(tl.int32)
            routed_blocks = tl.sum(routed, 1)
            is_whole = routed_blocks > BLOCKS // 2
            singles = tl.where(is_whole, 0, routed_blocks)
            before = block_count + tl.cumsum(singles, 0) - singles
            place = before[:, None] + tl.cumsum(routed, 1) - routed
            is_single = (routed > 0) & (is_whole == 0)[:, None]
            tl.store(blocks_ptr + place, (own_list * BLOCKS)[:, None] + in_list, mask=is_single)
            tl.store(priors_ptr + place, prior, mask=is_single)
            block_count += tl.sum(singles, 0)
        whole = is_whole.to(tl.int32)
        tl.store(entries_ptr + entry_count + tl.cumsum(whole, 0) - 1, entry, mask=is_whole)
        entry_count += tl.sum(whole, 0)
    tl.store(entry_counts_ptr + owner, entry_count)
    tl.store(block_counts_ptr + owner, block_count)
