"""The online softmax in Triton: attention over keys that come block by block.

Of the logits s that it has seen a row keeps highest = max s, total = sum 2^(s - highest) and acc = sum 2^(s - highest)
v; its output is acc / total, its log-sum-exp (highest + log2 total) ln 2. Logits are in units of log 2.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(highest, total, acc, logits, v):
    """The three with another block of keys: logits [ROWS, KEYS], finite in every row once, and v [KEYS, BLOCK_DIM]."""
    new_highest = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp2(logits - new_highest[:, None])
    total, acc = add_weighted(total, acc, weights, tl.exp2(highest - new_highest), v)
    return new_highest, total, acc


@triton.jit
def add_weighted(total, acc, weights, rescale, v):
    """total [ROWS] and acc [ROWS, BLOCK_DIM], rescaled to a new maximum, plus weights [ROWS, KEYS] and weights v."""
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return total, acc
