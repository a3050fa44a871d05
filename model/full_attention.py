"""Full causal softmax attention and its masks.

On CUDA, packed documents go through FlexAttention, which skips blocks that nobody sees and holds no [seq, seq] mask.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Softmax attention of q `[batch, seq, heads, head_dim]` over k, v `[batch, keys, kv_heads, head_dim]`.

    `mask` says who is seen, that of `document_mask`; None is plain causality.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def document_mask(document_starts: Tensor) -> Tensor | BlockMask:
    """Who sees whom in packed rows, from `[batch, seq]`: no later token, none before one's own document.

    A bool `[batch, 1, seq, seq]` on the CPU, FlexAttention's block mask on CUDA.
    """
    batch, seq = document_starts.shape
    if document_starts.is_cuda:

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= document_starts[row, query])

        return create_block_mask(sees, batch, None, seq, seq, device="cuda", _compile=True)
    index = torch.arange(seq)
    return ((index <= index[:, None]) & (index >= document_starts[..., None]))[:, None]


def prefix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last tokens of rows, q `[batch, seq, heads, head_dim]`, over all that came before them.

    k, v: `[batch, keys, kv_heads, head_dim]`; the last `seq` keys are the queries' own.
    """
    from torch.nn.attention.bias import causal_lower_right  # imports triton, which takes a while

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
