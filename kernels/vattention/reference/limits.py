"""How large the variance may be for all that a skewed sample tells, and the quantile of an error with that variance."""

from statistics import NormalDist

import torch
from torch import Tensor


def upper_limit(observed: Tensor, predicted: Tensor, p: Tensor, then: Tensor, confidence: float) -> Tensor:
    """The variance [batch, kv_heads, group] of a sum in which tokens are drawn with probability `then`, at most.

    observed, predicted: the squares of the tokens' errors and what the sketch expects of them, [batch, kv_heads, group,
    drawn]; p, then: [batch, kv_heads, drawn], p the probability with which these tokens were drawn.

    From the sample: its own estimate and `confidence` of that estimate's standard deviations. A sample may lack the few
    large errors, though: never less than what the sketch expects.
    """
    p, then = p[:, :, None], then[:, :, None]
    stands_for = (1 - then) / then / p
    parts = stands_for * observed
    spread = ((1 - p) * parts.square()).sum(-1).sqrt()
    return torch.maximum(parts.sum(-1) + confidence * spread, (stands_for * predicted).sum(-1))


def squared_quantile(errors: Tensor, p: Tensor, delta: float) -> Tensor:
    """Of |error|^2 / variance, exceeded with probability delta, for the vector errors [batch, kv_heads, group, drawn,
    head_dim] of tokens drawn with probability p: [batch, kv_heads, group].

    The error's covariance C is estimated by the sample's; |error|^2 is taken for a multiple of chi-square with
    nu = tr(C)^2 / tr(C^2) degrees of freedom (Satterthwaite), so the quantile falls from that of one direction towards
    1 as the error spreads over many. An estimate from few tokens has too small a nu, which errs on the safe side.
    """
    scaled = errors * (((1 - p) / p.square()).sqrt())[:, :, None, :, None]
    covariance = scaled.mT @ scaled
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    freedom = trace.square() / covariance.square().sum((-2, -1)).clamp(min=1e-30)
    freedom = freedom.clamp(min=1)
    one = torch.ones_like(freedom)
    exact = NormalDist().inv_cdf(1 - delta / 2) ** 2
    # Wilson and Hilferty's, which is 3 % too small at one degree of freedom: exact there, and right in the limit.
    return _chi_square(freedom, delta) * (1 + (exact / _chi_square(one, delta) - 1) / freedom)


def _chi_square(freedom: Tensor, delta: float) -> Tensor:
    """The 1 - delta quantile divided by the degrees of freedom, approximately."""
    variance = 2 / (9 * freedom)
    return (1 - variance + NormalDist().inv_cdf(1 - delta) * variance.sqrt()) ** 3
