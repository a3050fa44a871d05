"""The functions of permutation.py in Triton, bit for bit, in 32-bit words."""

import triton
import triton.language as tl

from dash_train.kernels.vattention.reference import permutation

ROUNDS = tl.constexpr(permutation.ROUNDS)
GOLDEN = tl.constexpr(permutation.GOLDEN)
MIX_1 = tl.constexpr(permutation.MIX_1)
MIX_2 = tl.constexpr(permutation.MIX_2)


@triton.jit
def sample_key(seed, kv_head):
    """uint32, from an int64 seed."""
    folded = mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32)))
    return mix(folded + kv_head.to(tl.uint32) * GOLDEN)


@triton.jit
def permute(index, size, key):
    """int32 index of any shape; int32 size and uint32 key are scalars. Returns int32."""
    size = size.to(tl.uint32)
    x = index.to(tl.uint32) + below(mix(key), size)
    x = tl.where(x >= size, x - size, x)
    for i in tl.static_range(1, ROUNDS + 1):
        round_key = mix(key + (i * GOLDEN) % 4294967296)
        partner = below(mix(round_key ^ GOLDEN), size) - x
        partner = tl.where(partner >= size, partner + size, partner)  # a negative difference is a huge unsigned one
        swaps = mix(tl.maximum(x, partner) ^ round_key) & 1
        x = tl.where(swaps != 0, partner, x)
    return x.to(tl.int32)


@triton.jit
def mix(x):
    """MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 13)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def below(word, size):
    """A uniform 32-bit word becomes a uniform number below size."""
    return ((word.to(tl.uint64) * size.to(tl.uint64)) >> 32).to(tl.uint32)
