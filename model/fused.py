"""The elementwise parts of a block: Liger's Triton kernels on CUDA, plain torch elsewhere, with the same results.

Liger's kernels compute in fp32 whatever the type of the tensors, and spare memory by working in place: RoPE overwrites
the queries and keys, and each backward pass the gradient it was given (SwiGLU's also its inputs). Nothing else may need
those tensors; in `Block` nothing does. Liger is imported at its first use: machines without CUDA do without it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), computed in fp32, returned in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # "gemma" names the rounding: once, at the end, as torch does ("llama" rounds before the weight).
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "gemma")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    if not gate.is_cuda:
        return F.silu(gate) * up
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q `[batch, seq, heads, head_dim]` and k `[batch, seq, kv_heads, head_dim]`, computed in fp32.

    cos and sin as `rotary_tables` gives them, fp32 `[batch or 1, seq, 1, head_dim / 2]`.
    """
    if not q.is_cuda:
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    from liger_kernel.ops.rope import LigerRopeFunction

    head_dim = q.shape[-1]  # Liger takes [batch, heads, seq, head_dim], and tables that cover half a head if told so
    q, k = LigerRopeFunction.apply(
        q.transpose(1, 2), k.transpose(1, 2), cos.squeeze(2), sin.squeeze(2), None, 1, head_dim
    )
    return q.transpose(1, 2), k.transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
