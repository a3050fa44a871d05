"""From lists to chunks, in Triton: for every chunk the tokens that attend to it, which dk and dv walk.

Every (chunk, list) pair is looked up by bisection, since lists ascend. Where several routing blocks share a list, and
at most half of them are routed to the chunk, these are named one by one; else the list is named as a whole. That needs
neither a sort nor atomics nor a matrix of all pairs, and gives the tokens in order, so sums over them are the same bits
every time. docs/internals.md has the words: list, entry, segment, inverse list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.search import first_at_least
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape


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
        lists,
        lengths,
        inverse,
        segment,
        segment.chunks.bit_length(),
        CHUNK=shape.chunk_size,
        CHUNK_LISTS=shape.chunk_size // shape.list_tokens,
        BLOCKS=shape.list_blocks,
        WIDTH=min(max(64, 1024 // shape.list_blocks), power_of_two(segment_lists)),
        num_warps=8,
    )
    return inverse


@triton.jit
def invert_kernel(
    lists,
    lengths_ptr,
    inverse,
    segment,
    steps,
    CHUNK: tl.constexpr,
    CHUNK_LISTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a chunk: the lists l with c in l, or the routing blocks j with c in R(j), both ascending.

    Only lists of later chunks can name it.
    """
    chunk = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    segment_lists = tl.cdiv(segment.tokens, CHUNK // CHUNK_LISTS)
    owner = batch_head * segment.chunks + chunk
    chunks_ptr = lists.chunks + batch_head * segment_lists * segment.chunks
    prior_ptr = lists.prior + batch_head * segment_lists * segment.chunks * BLOCKS
    lengths_ptr += batch_head * segment.row_lists + segment.list
    entries_ptr = inverse.entries + owner * segment_lists
    blocks_ptr = inverse.blocks + owner * segment_lists * (BLOCKS // 2)
    priors_ptr = inverse.priors + owner * segment_lists * (BLOCKS // 2)
    in_list = tl.arange(0, BLOCKS)[None, :]

    entry_count = 0
    block_count = 0
    for start in range(tl.maximum(chunk + 1 - segment.position // CHUNK, 0) * CHUNK_LISTS, segment_lists, WIDTH):
        # 1. The chunk's place in WIDTH lists.
        own_list = start + tl.arange(0, WIDTH)
        length = tl.load(lengths_ptr + own_list, mask=own_list < segment_lists, other=0)
        own_chunks = chunks_ptr + own_list.to(tl.int64) * segment.chunks
        place = first_at_least(own_chunks, length, chunk, steps)
        is_whole = tl.load(own_chunks + place, mask=place < length, other=-1) == chunk
        entry = own_list * segment.chunks + place  # [WIDTH]

        # 2. Of lists at most half of whose blocks are routed to the chunk, these blocks.
        if BLOCKS > 1:
            prior_place = prior_ptr + (entry.to(tl.int64) * BLOCKS)[:, None] + in_list
            prior = tl.load(prior_place, mask=is_whole[:, None], other=float("-inf"))  # [WIDTH, BLOCKS]
            routed = (prior > float("-inf")).to(tl.int32)
            routed_blocks = tl.sum(routed, 1)
            is_whole = routed_blocks > BLOCKS // 2
            singles = tl.where(is_whole, 0, routed_blocks)
            before = block_count + tl.cumsum(singles, 0) - singles
            single_place = before[:, None] + tl.cumsum(routed, 1) - routed
            is_single = (routed > 0) & (is_whole == 0)[:, None]
            tl.store(blocks_ptr + single_place, (own_list * BLOCKS)[:, None] + in_list, mask=is_single)
            tl.store(priors_ptr + single_place, prior, mask=is_single)
            block_count += tl.sum(singles, 0)

        # 3. The others as a whole.
        whole = is_whole.to(tl.int32)
        tl.store(entries_ptr + entry_count + tl.cumsum(whole, 0) - 1, entry, mask=is_whole)
        entry_count += tl.sum(whole, 0)
    tl.store(inverse.entry_counts + owner, entry_count)
    tl.store(inverse.block_counts + owner, block_count)
