"""Full causal softmax attention and its masks.

On CUDA no [seq, seq] mask is ever held. Rows that are one document go through one call of the fastest fused kernel,
cuDNN's on Hopper; packed documents go through FlexAttention, which skips blocks that nobody sees.
"""

from contextlib import nullcontext
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


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, query_starts: tuple[int, ...] = (0,)
) -> Tensor:
    """Softmax attention of q `[batch, q_len, heads, head_dim]` over k, v `[batch, keys, kv_heads, head_dim]`.

    `mask` says who is seen, that of `document_mask`; None is plain causality. q is as many equal pieces as
    `query_starts` names positions of the row, piece i from query_starts[i] on; default the whole row.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    elif mask is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    elif len(query_starts) == 1:
        out = _causal(q, k, v, *query_starts)
    else:
        pieces = q.chunk(len(query_starts), dim=2)
        out = torch.cat([_causal(piece, k, v, start) for piece, start in zip(pieces, query_starts, strict=True)], dim=2)
    return out.transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Queries of the positions from `start` on see the keys up to their own; sequences in dimension 2."""
    seen = start + q.shape[2]
    k, v = k[:, :, :seen], v[:, :, :seen]
    if q.is_cuda and q.dtype == torch.float32:  # the one kernel for it knows no groups in every version of torch
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    causality: dict[str, Any] = {"is_causal": True}
    if start:
        from torch.nn.attention.bias import causal_lower_right  # imports triton, which takes a while

        # A mask that is not a tensor: on CUDA it selects FlashAttention's causality from the last query and key back.
        causality = {"attn_mask": causal_lower_right(q.shape[2], seen)}
    with sdpa_kernel(FUSED, set_priority=True) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **causality, enable_gqa=k.shape[1] < q.shape[1])


def document_mask(document_starts: Tensor, positions: Tensor) -> Tensor | BlockMask:
    """Who sees whom in packed rows, from `[batch, seq]`: no later token, none before one's own document.

    `positions` `[q_len]` says where in the row the queries stand. A bool `[batch, 1, q_len, seq]` on the CPU,
    FlexAttention's block mask on CUDA. The values are not looked at, so the host waits for nothing: rows that are one
    document get a mask too, and are faster without.
    """
    batch, seq = document_starts.shape
    starts = document_starts[:, positions]
    if document_starts.is_cuda:

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= positions[query]) & (key >= starts[row, query])

        return create_block_mask(sees, batch, None, len(positions), seq, device="cuda", _compile=True)
    key = torch.arange(seq)
    return ((key <= positions[:, None]) & (key >= starts[..., None]))[:, None]
