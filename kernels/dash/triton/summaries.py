"""Stage 0 in Triton: ktilde_c = sum_j beta_j k_j with beta = softmax of a w.k_j over a chunk: the input of routing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.rows import batch_and_head


def summarize_chunks(k: Tensor, chunk_query: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """ktilde_c = sum_j softmax_j(w.k_j / sqrt(head_dim)) k_j of the chunks of k [batch, seq, kv_heads, head_dim].

    Returns the summaries [batch, chunks, kv_heads, head_dim] in fp32, and the same in k's type as a sum of parts
    [parts, batch, chunks, kv_heads, head_dim]: high and low half for 16-bit keys (one rounding alone would move chunks
    in and out of the routed set), a single part for fp32. A last, incomplete chunk gets the summary of its keys.
    """
    batch, seq, kv_heads, head_dim = k.shape
    chunks = -(-seq // chunk_size)
    summaries = k.new_empty(batch, chunks, kv_heads, head_dim, dtype=torch.float32)
    parts = k.new_empty(1 if k.dtype == torch.float32 else 2, *summaries.shape)
    block_dim = power_of_two(head_dim)
    launch(
        summaries_kernel,
        (chunks, batch * kv_heads),
        k,
        chunk_query.contiguous(),
        summaries,
        parts,
        *k.stride()[:3],
        seq,
        head_dim**-0.5,
        parts.stride(0),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        CHUNK=chunk_size,
        PARTS=parts.shape[0],
        num_warps=4 if chunk_size * block_dim <= 2**13 else 8,
    )
    return summaries, parts


def update_chunk_summaries(
    k_cache: Tensor, summaries: Tensor, lengths: Tensor, chunk_query: Tensor, chunk_size: int
) -> None:
    """Stores the summary of each sequence's last chunk, where the newest key at lengths - 1 completed it.

    k_cache [batch, capacity, kv_heads, head_dim], summaries [batch, chunks, kv_heads, head_dim], lengths [batch].
    """
    batch, _, kv_heads, head_dim = k_cache.shape
    block_dim = power_of_two(head_dim)
    update_kernel[(batch * kv_heads,)](
        k_cache,
        chunk_query.contiguous(),
        summaries,
        lengths,
        *k_cache.stride()[:3],
        *summaries.stride()[:3],
        head_dim**-0.5,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        CHUNK=chunk_size,
        num_warps=4 if chunk_size * block_dim <= 2**13 else 8,
    )


@triton.jit
def summaries_kernel(
    k_ptr,
    w_ptr,
    summaries_ptr,
    parts_ptr,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    seq,
    scale,
    part_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a chunk and KV head: its summary, and the same as a sum of `PARTS` parts in the keys' type."""
    chunk = tl.program_id(0)
    _, batch, head = batch_and_head(tl.program_id(1), KV_HEADS)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM

    rows = k_ptr + batch * k_batch_stride + head * k_head_stride + token.to(tl.int64) * k_token_stride
    w_head = w_ptr + head * HEAD_DIM
    summary = weighted_summary(rows, token < seq, w_head, scale, HEAD_DIM, BLOCK_DIM)  # [BLOCK_DIM]
    offset = ((batch * tl.num_programs(0) + chunk) * KV_HEADS + head) * HEAD_DIM + dim
    tl.store(summaries_ptr + offset, summary, mask=in_dim)
    high = summary.to(parts_ptr.dtype.element_ty)
    tl.store(parts_ptr + offset, high, mask=in_dim)
    if PARTS == 2:
        low = (summary - high.to(tl.float32)).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + part_stride + offset, low, mask=in_dim)


@triton.jit
def update_kernel(
    k_ptr,
    w_ptr,
    summaries_ptr,
    lengths_ptr,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    summary_batch_stride,
    summary_chunk_stride,
    summary_head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a KV head of a sequence: the summary of the chunk that the newest key completed, if it did."""
    _, batch, head = batch_and_head(tl.program_id(0), KV_HEADS)
    length = tl.load(lengths_ptr + batch)
    if (length == 0) | (length % CHUNK != 0):
        return
    chunk = (length // CHUNK - 1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    dim = tl.arange(0, BLOCK_DIM)
    rows = k_ptr + batch * k_batch_stride + head * k_head_stride + token * k_token_stride
    summary = weighted_summary(rows, token < length, w_ptr + head * HEAD_DIM, scale, HEAD_DIM, BLOCK_DIM)
    summaries_ptr += batch * summary_batch_stride + chunk * summary_chunk_stride + head * summary_head_stride
    tl.store(summaries_ptr + dim, summary, mask=dim < HEAD_DIM)


@triton.jit
def weighted_summary(rows, is_key, w_ptr, scale, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """sum_j softmax_j(w.k_j scale) k_j [BLOCK_DIM] of the keys at the pointers `rows` [CHUNK]."""
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    k = tl.load(rows[:, None] + dim[None, :], mask=is_key[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    w = tl.load(w_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
    logits = tl.where(is_key, tl.sum(k * w[None, :], 1) * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    weights = weights / tl.sum(weights, 0)
    return tl.sum(k * weights[:, None], 0)
