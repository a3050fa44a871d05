"""Stage 2 where torch has a faster kernel for it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dash_train.kernels.dash.reference.stages import attend, token_bias


def attend_fast(q: Tensor, k: Tensor, v: Tensor, prior: Tensor, positions: Tensor, chunk_size: int) -> Tensor:
    """stages.attend, of fp32 on CUDA by attend_fused."""
    if q.is_cuda and q.dtype == torch.float32:
        return attend_fused(q, k, v, token_bias(prior, positions, chunk_size))
    return attend(q, k, v, prior, positions, chunk_size)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The softmax of stage 2 by SDPA, which on CUDA (its memory-efficient kernels, fp32 in three passes of the tensor
    cores) is several times faster than plain torch; bias [batch, kv_heads, rows, keys], of token_bias.
    """
    if bias.requires_grad and not (q.requires_grad or k.requires_grad or v.requires_grad):
        q = q.detach().requires_grad_()  # else the kernel does not keep what the bias's own gradient needs
    # KV heads join the batch and the group are the heads, so that the bias, which they share, is not repeated.
    keys, values = (t.flatten(0, 1)[:, None].expand(-1, q.shape[2], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(0, 1), keys, values, attn_mask=bias.flatten(0, 1)[:, None])
    return out.unflatten(0, q.shape[:2])
