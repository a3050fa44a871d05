"""Stage 0's backward pass in Triton, joined with the last step: the gradients of keys and values in their own type."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.rows import batch_and_head


def summaries_backward(
    k: Tensor, chunk_query: Tensor, summaries: Tensor, dk: Tensor, dv: Tensor, dsummaries: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and chunk_query, in their types.

    k [batch, seq, kv_heads, head_dim]; chunk_query [kv_heads, head_dim]; summaries [batch, chunks, kv_heads, head_dim];
    dk, dv [batch * kv_heads, seq, head_dim], what attention passed; dsummaries [shares, batch * kv_heads, chunks,
    head_dim], whose sum routing passed: overwritten. All sums in fp32.
    """
    batch, seq, kv_heads, head_dim = k.shape
    chunks = summaries.shape[1]
    k_gradient = torch.empty_like(k, memory_format=torch.contiguous_format)
    v_gradient = torch.empty_like(k_gradient)
    block_dim = power_of_two(head_dim)
    launch(
        summaries_backward_kernel,
        (chunks, batch * kv_heads),
        k,
        chunk_query.contiguous(),
        summaries,
        dk,
        dv,
        dsummaries,
        k_gradient,
        v_gradient,
        *k.stride()[:3],
        seq,
        dsummaries.shape[0],
        head_dim**-0.5,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        CHUNK=chunk_size,
        num_warps=max(4, min(16, chunk_size * block_dim // 2048)),
    )
    per_chunk = dsummaries[0].view(batch, kv_heads, chunks, head_dim)
    return k_gradient, v_gradient, per_chunk.sum((0, 2)).to(chunk_query.dtype)


@triton.jit
def summaries_backward_kernel(
    k_ptr,
    w_ptr,
    summaries_ptr,
    dk_ptr,
    dv_ptr,
    dsummaries_ptr,
    k_gradient_ptr,
    v_gradient_ptr,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    seq,
    shares,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk and KV head, with u the summary's gradient: dl_j = beta_j u.(k_j - ktilde) a.

    dk_j += beta_j u + dl_j w and dw = sum dl_j k_j, which replaces u.
    """
    chunk = tl.program_id(0)
    batch_head, batch, head = batch_and_head(tl.program_id(1), KV_HEADS)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    mask = (token < seq)[:, None] & in_dim[None, :]

    # 1. beta, as in the forward pass.
    rows = k_ptr + batch * k_batch_stride + head * k_head_stride + token.to(tl.int64)[:, None] * k_token_stride
    k = tl.load(rows + dim[None, :], mask=mask, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_DIM]
    w = tl.load(w_ptr + head * HEAD_DIM + dim, mask=in_dim, other=0.0).to(tl.float32)
    logits = tl.where(token < seq, tl.sum(k * w[None, :], 1) * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    weights = weights / tl.sum(weights, 0)  # [CHUNK]

    # 2. u [BLOCK_DIM], the sum of all shares; dl [CHUNK]; dw.
    chunk_offset = ((batch * tl.num_programs(0) + chunk) * KV_HEADS + head) * HEAD_DIM + dim
    summary = tl.load(summaries_ptr + chunk_offset, mask=in_dim, other=0.0)
    dsummary_ptr = dsummaries_ptr + (batch_head * tl.num_programs(0) + chunk) * HEAD_DIM + dim
    dsummary = tl.load(dsummary_ptr, mask=in_dim, other=0.0)
    for share in range(1, shares):
        offset = share * tl.num_programs(1) * tl.num_programs(0) * HEAD_DIM
        dsummary += tl.load(dsummary_ptr + offset, mask=in_dim, other=0.0)
    dlogits = weights * tl.sum(dsummary[None, :] * (k - summary[None, :]), 1) * scale
    tl.store(dsummary_ptr, tl.sum(dlogits[:, None] * k, 0), mask=in_dim)

    # 3. dk and dv, [CHUNK, BLOCK_DIM], what attention passed included.
    offset = (batch_head * seq + token)[:, None] * HEAD_DIM + dim[None, :]
    dk = tl.load(dk_ptr + offset, mask=mask, other=0.0)
    dk += weights[:, None] * dsummary[None, :] + dlogits[:, None] * w[None, :]
    dv = tl.load(dv_ptr + offset, mask=mask, other=0.0)
    gradient = ((batch * seq + token) * KV_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(k_gradient_ptr + gradient, dk.to(k_gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(v_gradient_ptr + gradient, dv.to(v_gradient_ptr.dtype.element_ty), mask=mask)
