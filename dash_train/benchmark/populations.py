"""Synthetic populations of keys and values on which the guarantee of vAttention is measured."""

from typing import NamedTuple

import torch
from torch import Tensor

POPULATIONS = ("uniform", "peaked", "heavy-tailed", "needle", "cancelling")
NEEDLE = 0.2  # share of the softmax that a needle holds
PEAKED = 0.02  # share of the chunks whose logits are PEAK higher
PEAK = 4.0


class Problem(NamedTuple):
    """One decoding step of `rows` sequences, in the shapes of vattention_decode."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    chunk_bias: Tensor | None = None
    summaries: Tensor | None = None


def make_problem(
    name: str,
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    chunk_size: int,
    off_axis: float,
    generator: torch.Generator,
) -> Problem:
    """One KV head. Head h looks at channel h of the keys, which holds its logits, and a little at the rest, which is
    noise: it adds N(0, off_axis) to the logits, and far more to what the page bounds allow (at .1 about 1.5, at .8
    about 12).

    uniform: logits N(0, .5). peaked: N(0, 1), and 4 more in 2 % of the chunks. heavy-tailed: weights of a Pareto
    distribution with exponent 2.5 (no third moment). needle: N(0, 1), and one token that holds a fifth of the softmax.
    cancelling: uniform, with values of zero mean where all others have 1 + N(0, 1) in each channel.
    """
    device = generator.device

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    logits = normal(rows, context, heads)
    if name == "peaked":
        is_peak = uniform(rows, context // chunk_size, 1) < PEAKED
        logits += PEAK * is_peak.repeat_interleave(chunk_size, 1)
    elif name == "heavy-tailed":
        logits = -0.4 * uniform(rows, context, heads).clamp(min=1e-7).log()
    elif name != "needle":
        logits *= 0.5
    if name == "needle":
        place = torch.randint(context, (rows, 1, 1), generator=generator, device=device)
        height = (logits.logsumexp(1, keepdim=True)) + torch.tensor(NEEDLE / (1 - NEEDLE), device=device).log()
        logits.scatter_(1, place.expand(rows, 1, heads), height)
    k = normal(rows, context, 1, head_dim)
    k[..., 0, :heads] = logits
    q = off_axis / (head_dim - heads) ** 0.5 * normal(rows, heads, head_dim)
    q[:, :, :heads] = torch.eye(heads, device=device)
    v = normal(rows, context, 1, head_dim) + (name != "cancelling")
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    return Problem(head_dim**0.5 * q, k, v, lengths)
