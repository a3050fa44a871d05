"""How query rows are cut for the kernels: tiles of tokens, and segments of tiles that share one workspace of lists.

A tile is `tile_tokens` consecutive query tokens with all heads of their group, 64 rows of the matrix products. It lies in
one chunk, so its tokens have the same own chunk and the same eligible chunks. For each tile routing writes the list of the
chunks that any of its tokens is routed to, with every token's log-prior. A list is as long as the tile's history allows,
whatever the density; the whole sequence's lists would be quadratic in memory, so queries are walked in segments.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

TILE_ROWS = 64  # the rows of one warpgroup's matrix instruction
RESIDENT_CHUNKS = 512  # up to so many chunks a tile's routing scores fit into registers
MIN_WIDTH = 64
WORKSPACE_BYTES = 2**29  # the lists of one segment take at most this (but at least one chunk of queries')


class Shape(NamedTuple):
    """Sizes shared by all kernels of one call."""

    batch: int
    q_len: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        """Rows a token takes in a tile: the group, filled up to a power of two."""
        return triton.next_power_of_2(self.group)

    @property
    def tile_tokens(self) -> int:
        return max(1, min(self.chunk_size, TILE_ROWS // self.padded_group))


class Segment(NamedTuple):
    """Consecutive query rows of one piece."""

    row: int  # first row of q
    position: int  # its position in the sequence
    tokens: int
    tile: int  # its tile, counted over all pieces
    width: int  # upper bound of the chunks that one of its tokens may be routed to, a power of two


class Lists(NamedTuple):
    """What one segment's tiles attend to. Entry i of a tile is read only when i < length; lengths live with the statistics."""

    chunks: Tensor  # [batch * kv_heads, tiles, capacity] int32, ascending
    prior: Tensor  # [batch * kv_heads, tiles, capacity, tile_tokens] fp32: pbar, then the log-prior in its place


def segments(shape: Shape, query_starts: tuple[int, ...]) -> Iterator[Segment]:
    """Cuts each piece of q where the width doubles, and further so that every segment's lists fit into the workspace."""
    piece = shape.q_len // len(query_starts)
    for i, start in enumerate(query_starts):
        done = 0
        while done < piece:
            position = start + done
            width = max(MIN_WIDTH, triton.next_power_of_2(position // shape.chunk_size + 1))
            tokens = min(piece - done, width * shape.chunk_size - position)
            if width > RESIDENT_CHUNKS:  # width no longer decides which kernel runs: cut by memory alone
                tokens = piece - done
                width = triton.next_power_of_2(triton.cdiv(start + piece, shape.chunk_size))
            tokens = min(tokens, _tokens_in_workspace(shape, width))
            tile = (i * triton.cdiv(piece, shape.tile_tokens)) + done // shape.tile_tokens
            yield Segment(i * piece + done, position, tokens, tile, width)
            done += tokens


def workspace_bytes(shape: Shape, query_starts: tuple[int, ...] = (0,)) -> int:
    """Bytes of the lists that a call allocates: known before anything is routed, reached at no density."""
    return max(_tiles(shape, s.tokens) * _bytes_per_tile(shape, s.width) for s in segments(shape, query_starts))


def new_lists(shape: Shape, query_starts: tuple[int, ...], device: torch.device) -> list[tuple[Segment, Lists]]:
    """The segments, each with its lists; all of them are views of one workspace, so one segment is finished before the next."""
    workspace = torch.empty(workspace_bytes(shape, query_starts) // 4, dtype=torch.int32, device=device)
    result = []
    for segment in segments(shape, query_starts):
        entries = (
            shape.batch * shape.kv_heads,
            _tiles(shape, segment.tokens) // (shape.batch * shape.kv_heads),
            segment.width,
        )
        count = entries[0] * entries[1] * entries[2]
        chunks = workspace[:count].view(entries)
        prior = workspace[count : count * (1 + shape.tile_tokens)].view(torch.float32).view(*entries, shape.tile_tokens)
        result.append((segment, Lists(chunks, prior)))
    return result


def _tiles(shape: Shape, tokens: int) -> int:
    return shape.batch * shape.kv_heads * triton.cdiv(tokens, shape.tile_tokens)


def _bytes_per_tile(shape: Shape, width: int) -> int:
    return 4 * width * (1 + shape.tile_tokens)


def _tokens_in_workspace(shape: Shape, width: int) -> int:
    """Whole chunks of queries whose lists fit into WORKSPACE_BYTES, at least one."""
    tiles_per_chunk = _tiles(shape, shape.chunk_size)
    chunks = WORKSPACE_BYTES // (tiles_per_chunk * _bytes_per_tile(shape, width))
    return max(1, chunks) * shape.chunk_size
