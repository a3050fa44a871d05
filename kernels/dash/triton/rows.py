"""What the kernels of the backward pass share: where the rows of a tile lie, and the sizes of matrix products."""

import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.triton.tiles import Shape


def product_precision(shape: Shape) -> str:
    """How fp32 is multiplied: in three passes of the tensor cores, nearly as exact as fp32, where these find room."""
    return "tf32x3" if shape.head_dim <= 128 else "ieee"


def keys_in_product(k: Tensor, shape: Shape) -> int:
    """Keys of one matrix product: what shared memory has room for. A chunk may be several."""
    return min(shape.chunk_size, 16 if k.element_size() == 4 and shape.head_dim > 64 else 64)


@triton.jit
def blocks_of(segment, ROUTING_BLOCK: tl.constexpr):
    """The first routing block of a segment, how many it has, and how many a row of q has."""
    return segment.row // ROUTING_BLOCK, tl.cdiv(segment.tokens, ROUTING_BLOCK), tl.cdiv(segment.q_len, ROUTING_BLOCK)


@triton.jit
def tile_rows(
    tile,
    tokens,
    kv_head,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Token within the segment, query head, and whether both exist: of each row of a tile, [TILE * PADDED_GROUP].

    The same with routing blocks in place of tokens.
    """
    row = tl.arange(0, TILE * PADDED_GROUP)
    token = tile * TILE + row // PADDED_GROUP
    head = row % PADDED_GROUP
    return token, kv_head * GROUP + head, (token < tokens) & (head < GROUP)
