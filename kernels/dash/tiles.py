"""How query rows are cut for the kernels: into tiles, and into segments of tiles that share one workspace of lists.

A tile is `tile_tokens` consecutive query tokens with all heads of their group, at most 64 rows of the matrix products.
It lies in one chunk, so its tokens have the same own chunk and the same eligible chunks. For each tile routing writes
the list of the chunks that any of its tokens is routed to. A list has room for the tile's whole history, so no density
overflows it; lists of all tiles at once would be quadratic in memory, hence the segments.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TILE_ROWS = 64  # the rows of one warpgroup's matrix instruction
RESIDENT_CHUNKS = 512  # the scores of so many chunks fit into a program's registers
MIN_WIDTH = 128  # routing's least
WORKSPACE_BYTES = 2**29  # the lists of one segment take at most this, or what one chunk of queries needs


def power_of_two(number: int) -> int:
    """The least that is at least `number`. (triton.next_power_of_2 costs the host ten times as much.)"""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """Sizes shared by all kernels of one call."""

    batch: int
    q_len: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int

    @cached_property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @cached_property
    def padded_group(self) -> int:
        """The rows a token takes in a tile: its group, filled up to a power of two."""
        return power_of_two(self.group)

    @cached_property
    def block_dim(self) -> int:
        """What kernels take for head_dim: filled up to a power of two."""
        return power_of_two(self.head_dim)

    @cached_property
    def tile_tokens(self) -> int:
        return max(1, min(self.chunk_size, TILE_ROWS // self.padded_group))

    @cached_property
    def words(self) -> int:
        """32-bit words with a bit for every chunk of a row."""
        return -(-self.seq // (32 * self.chunk_size))

    def tiles(self, tokens: int) -> int:
        """Tiles of so many consecutive queries, in one KV head of one row."""
        return -(-tokens // self.tile_tokens)


def shape_of(q: Tensor, k: Tensor, chunk_size: int) -> Shape:
    """q [batch, q_len, heads, head_dim], k [batch, seq, kv_heads, head_dim]."""
    return Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], chunk_size)


class Segment(NamedTuple):
    """Consecutive queries of one piece."""

    row: int  # of q, the first
    position: int  # of that row in the sequence
    tokens: int
    tile: int  # number of the first tile, all pieces counted
    chunks: int  # an upper bound of what a query of the segment can be routed to


class Lists(NamedTuple):
    """What each tile of one segment may be routed to, then what it is. Lengths: Routing.union_chunks."""

    chunks: Tensor  # [batch * kv_heads, tiles, segment.chunks] int32, ascending
    prior: Tensor  # [batch * kv_heads, tiles, segment.chunks, tile_tokens] fp32: pbar, later the log-prior


@lru_cache
def segments(shape: Shape, query_starts: tuple[int, ...]) -> tuple[Segment, ...]:
    """Cuts each piece of q so that every segment's lists fit into the workspace, and where history doubles.

    The latter up to RESIDENT_CHUNKS: routing keeps a power of two of scores per query in registers.
    """
    piece = shape.q_len // len(query_starts)
    cut = []
    for i, start in enumerate(query_starts):
        done = 0
        while done < piece:
            position = start + done
            tokens = piece - done
            width = max(MIN_WIDTH, power_of_two(position // shape.chunk_size + 1))
            if width <= RESIDENT_CHUNKS:
                tokens = min(tokens, width * shape.chunk_size - position)
            tokens = min(tokens, _tokens_in_workspace(shape, -(-(position + tokens) // shape.chunk_size)))
            chunks = -(-(position + tokens) // shape.chunk_size)
            first_tile = i * shape.tiles(piece) + shape.tiles(done)
            cut.append(Segment(i * piece + done, position, tokens, first_tile, chunks))
            done += tokens
    return tuple(cut)


@lru_cache
def workspace_bytes(shape: Shape, query_starts: tuple[int, ...] = (0,)) -> int:
    """Bytes of the lists that a call allocates: known before anything is routed, and enough at any density."""
    return max(
        shape.batch * shape.kv_heads * shape.tiles(segment.tokens) * _list_bytes(shape, segment.chunks)
        for segment in segments(shape, query_starts)
    )


def new_lists(shape: Shape, query_starts: tuple[int, ...], device: torch.device) -> Iterator[tuple[Segment, Lists]]:
    """Every segment with its lists: views of one workspace, so a segment is finished before the next is begun.

    The longest come first: while the device works on them the host gets ahead with launching the short ones.
    """
    size_in_bytes = workspace_bytes(shape, query_starts)
    logger.debug("lists of %s: %d bytes", shape, size_in_bytes)
    workspace = torch.empty(size_in_bytes // 4, dtype=torch.int32, device=device)
    for segment in sorted(segments(shape, query_starts), key=lambda segment: -segment.chunks):
        size = (shape.batch * shape.kv_heads, shape.tiles(segment.tokens), segment.chunks)
        entries = size[0] * size[1] * size[2]
        prior = workspace[entries : entries * (1 + shape.tile_tokens)].view(torch.float32)
        yield segment, Lists(workspace[:entries].view(size), prior.view(*size, shape.tile_tokens))


def _list_bytes(shape: Shape, chunks: int) -> int:
    """Bytes of one tile's list: a chunk number and a float per token in every entry."""
    return 4 * chunks * (1 + shape.tile_tokens)


def _tokens_in_workspace(shape: Shape, chunks: int) -> int:
    """Whole chunks of queries whose lists fit into WORKSPACE_BYTES; at least one."""
    chunk_bytes = shape.batch * shape.kv_heads * shape.tiles(shape.chunk_size) * _list_bytes(shape, chunks)
    return max(1, WORKSPACE_BYTES // chunk_bytes) * shape.chunk_size
