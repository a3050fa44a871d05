"""Where the rows of a tile lie in memory: shared by the kernels of the backward pass."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(
    tile,
    tokens,
    kv_head,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Token within the segment, query head, and whether both exist, of each of a tile's TILE * PADDED_GROUP rows."""
    row = tl.arange(0, TILE * PADDED_GROUP)
    token = tile * TILE + row // PADDED_GROUP
    head = row % PADDED_GROUP
    return token, kv_head * GROUP + head, (token < tokens) & (head < GROUP)
