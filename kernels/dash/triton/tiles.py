"""How queries are cut for the kernels: into blocks, tiles and lists, and into segments that share one workspace.

docs/internals.md has the words. A list belongs to `list_tokens` consecutive tokens: to a routing block where that holds
a tile or more, and then serves several tiles; else to a tile, of `list_blocks` routing blocks, each of which has its
own log-prior in every entry. Blocks, tiles and lists lie in one chunk, so their tokens have the same own chunk and the
same eligible chunks.

A list has room for its tokens' whole history, so no density overflows it; lists of all tokens at once would be
quadratic in memory, hence the segments.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import MATRIX_ROWS, power_of_two

logger = logging.getLogger(__name__)

TILE_ROWS = 64  # the rows of one wgmma
ROUTING_ROWS = 32  # of a program that routes for several lists: fewer than TILE_ROWS, see router_blocks
RESIDENT_CHUNKS = 512  # the scores of so many chunks fit into a program's registers
MIN_WIDTH = 128  # routing's least
WORKSPACE_BYTES = 2**29  # the lists of one segment take at most this, or what one chunk of queries needs
QUERY_NUMBERS = 2**24  # of a segment's queries of one KV head in the backward pass, where L2 is to hold them and dout


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
    routing_block: int = 1

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
        """Tokens of a tile of TILE_ROWS rows."""
        return max(1, min(self.chunk_size, TILE_ROWS // self.padded_group))

    @cached_property
    def list_tokens(self) -> int:
        """Tokens that share a list."""
        return max(self.routing_block, self.tile_tokens)

    @cached_property
    def list_blocks(self) -> int:
        """Routing blocks that share a list: log-priors in each of its entries."""
        return self.list_tokens // self.routing_block

    @cached_property
    def list_tiles(self) -> int:
        """Tiles that share a list."""
        return self.list_tokens // self.tile_tokens

    @cached_property
    def router_blocks(self) -> int:
        """Routing blocks that one program routes: those of a list, or some lists of one block.

        Few enough in the latter case that their scores come from the same kind of product (wgmma or mma.sync) as those
        of one block, which are computed again in the backward pass and must be the same to the bit.
        """
        if self.list_blocks > 1:
            return self.list_blocks
        return max(1, min(self.chunk_size // self.routing_block, ROUTING_ROWS // self.padded_group))

    @cached_property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.seq // self.chunk_size)

    @cached_property
    def words(self) -> int:
        """32-bit words with a bit for every chunk of a row."""
        return -(-self.chunks // 32)

    @cached_property
    def q_blocks(self) -> int:
        """Routing blocks of all queries of a row."""
        return self.blocks(self.q_len)

    def rows_of_block(self, blocks: int) -> int:
        """The rows that a routing block takes where `blocks` of them are a matrix: filled up to MATRIX_ROWS in all."""
        return max(self.padded_group, MATRIX_ROWS // blocks)

    def blocks(self, tokens: int) -> int:
        """Routing blocks of so many consecutive queries."""
        return -(-tokens // self.routing_block)

    def tiles(self, tokens: int) -> int:
        """Tiles of so many consecutive queries, in one KV head of one row."""
        return -(-tokens // self.tile_tokens)

    def lists(self, tokens: int) -> int:
        """Lists of so many consecutive queries, in one KV head of one row."""
        return -(-tokens // self.list_tokens)


def shape_of(q: Tensor, k: Tensor, chunk_size: int, routing_block: int = 1) -> Shape:
    """q [batch, q_len, heads, head_dim], k [batch, seq, kv_heads, head_dim]."""
    return _shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], chunk_size, routing_block)


_shape = lru_cache(Shape)  # with what it has computed


class Segment(NamedTuple):
    """Consecutive queries of one piece, and the sizes of the call that they are a part of.

    Kernels take it as one argument, and are compiled anew where one of its numbers becomes, or ceases to be, a multiple
    of 16 or 1: what follows from these numbers and from constants they compute.
    """

    row: int  # of q, the first
    position: int  # of that row in k
    tokens: int
    list: int  # number of the first list, all pieces counted
    chunks: int  # an upper bound of what a query of the segment can be routed to: the capacity of its lists
    q_len: int  # of the call
    seq: int  # of the call
    row_lists: int  # lists of a row of q


class Strides(NamedTuple):
    """Of q, k, v or the routers' queries; their last dimension is contiguous."""

    batch: int
    token: int
    head: int


def strides_of(t: Tensor) -> Strides:
    """t [batch, tokens, heads, head_dim]."""
    return _strides(t.stride())


@lru_cache
def _strides(strides: tuple[int, int, int, int]) -> Strides:
    return Strides(*strides[:3])


class Lists(NamedTuple):
    """What each list's tokens may be routed to, then what they are. RoutingResults has the lengths."""

    chunks: Tensor  # [batch * kv_heads, lists, segment.chunks] int32, ascending
    prior: Tensor  # [batch * kv_heads, lists, segment.chunks, list_blocks] fp32: pbar, later the log-prior


@lru_cache
def segments(shape: Shape, query_starts: tuple[int, ...], backward: bool = False) -> tuple[Segment, ...]:
    """Cuts each piece of q so that every segment's lists fit into the workspace, and where history doubles.

    In the backward pass with what is made of them there, and short enough that the queries and the gradients of outputs
    that dk and dv walk, chunk after chunk, stay in the cache. History is cut where it doubles up to RESIDENT_CHUNKS:
    routing keeps a power of two of scores per query in registers.
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
            tokens = min(tokens, _tokens_in_workspace(shape, -(-(position + tokens) // shape.chunk_size), backward))
            if backward:
                tokens = min(tokens, _tokens_in_cache(shape))
            chunks = -(-(position + tokens) // shape.chunk_size)
            cut.append(
                Segment(
                    row=i * piece + done,
                    position=position,
                    tokens=tokens,
                    list=i * shape.lists(piece) + shape.lists(done),
                    chunks=chunks,
                    q_len=shape.q_len,
                    seq=shape.seq,
                    row_lists=len(query_starts) * shape.lists(piece),
                )
            )
            done += tokens
    return tuple(cut)


@lru_cache
def workspace_bytes(shape: Shape, query_starts: tuple[int, ...] = (0,), backward: bool = False) -> int:
    """Bytes of the lists that a call allocates: known before anything is routed, and enough at any density."""
    return max(
        4 * shape.batch * shape.kv_heads * shape.lists(segment.tokens) * segment.chunks * (1 + shape.list_blocks)
        for segment in segments(shape, query_starts, backward)
    )


def new_lists(
    shape: Shape, query_starts: tuple[int, ...], device: torch.device, backward: bool = False
) -> Iterator[tuple[Segment, Lists]]:
    """Every segment with its lists: views of one workspace, so a segment is finished before the next is begun.

    The longest come first: while the device works on them the host gets ahead with launching the short ones.
    """
    size_in_bytes = workspace_bytes(shape, query_starts, backward)
    logger.debug("lists of %s: %d bytes", shape, size_in_bytes)
    workspace = torch.empty(size_in_bytes // 4, dtype=torch.int32, device=device)
    numbers = workspace.view(torch.float32)
    for segment in longest_first(shape, query_starts, backward):
        size = (shape.batch * shape.kv_heads, shape.lists(segment.tokens), segment.chunks)
        strides = (size[1] * size[2], size[2], 1)
        blocks = shape.list_blocks
        prior_strides = (strides[0] * blocks, strides[1] * blocks, blocks, 1)
        prior = numbers.as_strided((*size, blocks), prior_strides, size[0] * strides[0])
        yield segment, Lists(workspace.as_strided(size, strides), prior)


@lru_cache
def longest_first(shape: Shape, query_starts: tuple[int, ...], backward: bool = False) -> tuple[Segment, ...]:
    """The segments, those of the longest histories first."""
    return tuple(sorted(segments(shape, query_starts, backward), key=lambda segment: -segment.chunks))


def _tokens_in_workspace(shape: Shape, chunks: int, backward: bool) -> int:
    """Whole chunks of queries whose lists fit into WORKSPACE_BYTES; at least one.

    An entry is a chunk's number and a float per routing block, in the backward pass also a gradient per block or tile
    and a place per block in the inverse lists.
    """
    entry = 1 + shape.list_blocks
    if backward:
        entry += shape.list_blocks + (shape.list_tiles if shape.list_tiles > 1 else 0)
    chunk_bytes = 4 * shape.batch * shape.kv_heads * shape.lists(shape.chunk_size) * chunks * entry
    return max(1, WORKSPACE_BYTES // chunk_bytes) * shape.chunk_size


def _tokens_in_cache(shape: Shape) -> int:
    """Whole chunks of queries of which one KV head's are QUERY_NUMBERS; at least one."""
    return max(1, QUERY_NUMBERS // (shape.group * shape.head_dim * shape.chunk_size)) * shape.chunk_size
