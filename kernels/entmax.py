"""Entmax-1.5 (Peters, Niculae and Martins, 2019, arXiv 1905.05702): a softmax with exact zeros.

For scores s, with z = s / 2, p = max(z - tau, 0)^2 where the threshold tau makes p sum to one. Everything here works on
z relative to its row maximum, where tau lies in [-1, 0): the precision of tau then does not depend on the size of s.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dash_train.kernels.common.numbers import compute_dtype


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """The exact entmax-1.5 of `scores` along `dim`, differentiable.

    Any shape and floating type; half types are computed in float32 and returned in their own. An entry of -inf gets
    probability 0; a row of nothing but -inf gives zeros. Sort-based: algorithm 2 of Peters et al., 2019.
    """
    rows = scores.movedim(dim, -1).to(compute_dtype(scores.dtype))
    z, _ = relative_to_max(rows / 2)
    root = (z - threshold15(z)).clamp(min=0)
    return probability(rows, root).movedim(-1, dim).to(scores.dtype)


def relative_to_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """`z` minus the maximum of each row (last dimension), and that maximum `[..., 1]`: 0 for a row of only -inf."""
    row_max = z.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    return z - row_max, row_max


def threshold15(z: Tensor) -> Tensor:
    """tau `[..., 1]` such that sum max(z - tau, 0)^2 = 1, for rows (last dimension) relative to their maximum.

    -1 for a row of only -inf. The k largest entries, were they the support, would have the threshold
    mean - sqrt(1/k - variance); the support is the largest k whose threshold is below its k-th entry.
    """
    # tau >= -1, so entries below -1 never count: clamped to -2, those of -inf do no harm in the running sums.
    descending = z.clamp(min=-2).sort(dim=-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = descending.cumsum(-1) / k
    variance = (descending.square().cumsum(-1) / k - mean.square()).clamp(min=0)
    candidates = mean - (1 / k - variance).clamp(min=0).sqrt()
    size = (candidates <= descending).sum(-1, keepdim=True).clamp(min=1)
    tau = candidates.gather(-1, size - 1).clamp(min=-1)
    return _polish(z, tau)


def threshold15_on(z: Tensor, support: Tensor) -> Tensor:
    """tau `[..., 1]` in closed form when the support (bool, like `z`) is known; -1 where it is empty."""
    size = support.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
    mean = z.masked_fill(~support, 0).sum(-1, keepdim=True) / size
    variance = (z - mean).masked_fill(~support, 0).square().sum(-1, keepdim=True) / size
    return mean - (1 / size - variance).clamp(min=0).sqrt()


def _polish(z: Tensor, tau: Tensor) -> Tensor:
    """Solves the quadratic of tau's support once more, about tau: removes the rounding of the running sums."""
    distance = (z - tau).clamp(min=0)
    size = (distance > 0).sum(-1, keepdim=True)
    total = distance.sum(-1, keepdim=True)
    excess = distance.square().sum(-1, keepdim=True) - 1
    discriminant = (total.square() - size * excess).clamp(min=0)
    step = excess / (total + discriminant.sqrt())
    return torch.where(size > 0, tau + step, tau)


def probability(scores: Tensor, root: Tensor) -> Tensor:
    """p = root^2 with entmax-1.5's gradient for `scores`, where root = max(z - tau, 0) was found without gradient."""
    p: Tensor = _Probability.apply(scores, root.detach())
    return p


class _Probability(torch.autograd.Function):
    """Forward r^2; backward ds = r dp - r kappa with kappa = sum(r dp) / sum(r): the Jacobian of entmax-1.5."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, root: Tensor) -> Tensor:
        ctx.save_for_backward(root)
        return root.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None]:
        (root,) = ctx.saved_tensors
        root_dp = root * dp
        total = root.sum(-1, keepdim=True)
        kappa = root_dp.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
        return root_dp - root * kappa, None
