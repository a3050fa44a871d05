"""The order in which the residual is sampled: a keyed permutation of [0, size), one value at a time.

A "swap-or-not" shuffle (Hoang, Morris and Rogaway, 2012): a round pairs x with `shift - x` modulo the size, and a coin
that depends on the pair alone says whether the two change places. Each round is a permutation of exactly [0, size), so
nothing is stored, sorted or rejected, and any prefix of the order is a sample without replacement. The rotation at
the start makes every place equally likely by itself; a pair of places keeps its distance through all rounds with
probability 2^-ROUNDS. permutation_triton.py has the same in Triton.
"""

import torch
from torch import Tensor

ROUNDS = 24
GOLDEN = 0x9E3779B9
MIX_1 = 0x85EBCA6B  # of MurmurHash3's finaliser, as are the shifts beside them
MIX_2 = 0xC2B2AE35
WORD = 0xFFFFFFFF


def sample_key(seed: Tensor, kv_heads: int) -> Tensor:
    """The key of each KV head's permutation, int64 [batch, kv_heads] below 2^32, from seed int64 [batch]."""
    folded = mix(mix(seed >> 32 & WORD) ^ (seed & WORD))
    head = torch.arange(kv_heads, device=seed.device)
    return mix(folded[:, None] + head * GOLDEN & WORD)


def permute(index: Tensor, size: Tensor, key: Tensor) -> Tensor:
    """The place that comes index-th; all int64, broadcast against each other, 0 <= index < size < 2^31."""
    x = (index + _below(mix(key), size)) % size
    for i in range(1, ROUNDS + 1):
        round_key = mix(key + i * GOLDEN & WORD)
        partner = (_below(mix(round_key ^ GOLDEN), size) - x) % size
        swaps = mix(torch.maximum(x, partner) ^ round_key) & 1
        x = torch.where(swaps.bool(), partner, x)
    return x


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, in int64, after which neighbours are unlike."""
    x = (x ^ x >> 16) * MIX_1 & WORD
    x = (x ^ x >> 13) * MIX_2 & WORD
    return x ^ x >> 16


def _below(word: Tensor, size: Tensor) -> Tensor:
    """A uniform 32-bit word becomes a uniform number below size."""
    return word * size >> 32
