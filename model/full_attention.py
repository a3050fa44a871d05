"""Full causal softmax attention and its masks.

On CUDA no [seq, seq] mask is ever held. Rows that are one document go through one call of the fastest fused kernel,
cuDNN's on Hopper; packed documents go through FlexAttention, which skips blocks that nobody sees.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# The first that can do the call does it. Without the math backend, which would hold all the scores.
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Softmax attention of q `[batch, seq, heads, head_dim]` over k, v `[batch, keys, kv_heads, head_dim]`.

    `mask` says who is seen: that of `document_mask` or `cache_mask`; None is plain causality.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    elif mask is None and q.is_cuda:
        out = _fused_causal_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def _fused_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.float32:  # the one kernel for it knows no groups in every version of torch
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(FUSED, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])


def document_mask(document_starts: Tensor) -> Tensor | BlockMask | None:
    """Who sees whom in packed rows, from `[batch, seq]`: no later token, none before one's own document.

    None where every row is one document; else a bool `[batch, 1, seq, seq]` on the CPU, FlexAttention's block mask on
    CUDA. To tell which, the host waits for the device: once a forward pass, before its first block.
    """
    if not document_starts.any():
        return None
    batch, seq = document_starts.shape
    if document_starts.is_cuda:

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= document_starts[row, query])

        return create_block_mask(sees, batch, None, seq, seq, device="cuda", _compile=True)
    index = torch.arange(seq)
    return ((index <= index[:, None]) & (index >= document_starts[..., None]))[:, None]


def cache_mask(lengths: Tensor, capacity: int) -> Tensor:
    """The cached tokens of rows of `lengths` `[batch]`, bool `[batch, 1, 1, capacity]`."""
    return (torch.arange(capacity, device=lengths.device) < lengths[:, None])[:, None, None]
