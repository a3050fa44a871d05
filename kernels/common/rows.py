"""Which part of a call a program works on, in Triton."""

import triton
import triton.language as tl


@triton.jit
def batch_and_head(batch_head, KV_HEADS: tl.constexpr):
    """(batch_head, batch, KV head), in 64 bits for offsets, from batch_head = batch * KV_HEADS + KV head."""
    batch_head = batch_head.to(tl.int64)
    return batch_head, batch_head // KV_HEADS, batch_head % KV_HEADS
