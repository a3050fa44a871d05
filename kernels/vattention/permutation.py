"""The order in which the residual is sampled: a keyed permutation of [0, size), one value at a time.

A "swap-or-not" shuffle (Hoang, Morris and Rogaway, 2012): a round pairs x with `shift - x` modulo the size, and a coin
that depends on the pair alone says whether the two change places. Each round is a permutation of exactly [0, size), so
nothing is stored, sorted or rejected, and any prefix of the order is a sample without replacement. The rotation at
the start makes every place equally likely by itself; a pair of places keeps its distance through all rounds with
probability 2^-ROUNDS. The same function stands here twice, for torch and for Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(24)
GOLDEN = tl.constexpr(0x9E3779B9)
MIX_1 = tl.constexpr(0x85EBCA6B)  # of MurmurHash3's finaliser, as are the shifts beside them
MIX_2 = tl.constexpr(0xC2B2AE35)
WORD = 0xFFFFFFFF


def sample_key(seed: Tensor, kv_heads: int) -> Tensor:
    """The key of each KV head's permutation, int64 [batch, kv_heads] below 2^32, from seed int64 [batch]."""
    folded = _mix(_mix(seed >> 32 & WORD) ^ (seed & WORD))
    head = torch.arange(kv_heads, device=seed.device)
    return _mix(folded[:, None] + head * GOLDEN.value & WORD)


def permute(index: Tensor, size: Tensor, key: Tensor) -> Tensor:
    """The place that comes index-th; all int64, broadcast against each other, 0 <= index < size < 2^31."""
    x = (index + _below(_mix(key), size)) % size
    for i in range(1, ROUNDS.value + 1):
        round_key = _mix(key + i * GOLDEN.value & WORD)
        partner = (_below(_mix(round_key ^ GOLDEN.value), size) - x) % size
        swaps = _mix(torch.maximum(x, partner) ^ round_key) & 1
        x = torch.where(swaps.bool(), partner, x)
    return x


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * MIX_1.value & WORD
    x = (x ^ x >> 13) * MIX_2.value & WORD
    return x ^ x >> 16


def _below(word: Tensor, size: Tensor) -> Tensor:
    """A uniform 32-bit word becomes a uniform number below size."""
    return word * size >> 32


@triton.jit
def sample_key_triton(seed, kv_head):
    """uint32, from an int64 seed."""
    folded = mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32)))
    return mix(folded + kv_head.to(tl.uint32) * GOLDEN)


@triton.jit
def permute_triton(index, size, key):
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
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 13)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def below(word, size):
    return ((word.to(tl.uint64) * size.to(tl.uint64)) >> 32).to(tl.uint32)
