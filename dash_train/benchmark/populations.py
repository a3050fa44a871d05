"""Synthetic populations of keys and values on which the guarantee of vAttention is measured."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ONE_CHANNEL = ("uniform", "peaked", "heavy-tailed", "needle", "cancelling")
ALL_CHANNELS = ("normal-1", "normal-2", "normal-3", "alike", "hidden-needle")
POPULATIONS = ONE_CHANNEL + ALL_CHANNELS
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
    """One KV head. In the populations ONE_CHANNEL head h looks at channel h of the keys, which holds its logits, and a
    little at the rest, which is noise: it adds N(0, off_axis) to the logits, and far more to what the page bounds allow
    (at .1 about 1.5, at .8 about 12).

    uniform: logits N(0, .5). peaked: N(0, 1), and 4 more in 2 % of the chunks. heavy-tailed: weights of a Pareto
    distribution with exponent 2.5 (no third moment). needle: N(0, 1), and one token that holds a fifth of the softmax.
    cancelling: uniform, with values of zero mean where all others have 1 + N(0, 1) in each channel.

    In ALL_CHANNELS, as in models, a head's query has a direction of its own, any (make_spread_problem), so that page
    bounds say next to nothing.
    """
    if name in ALL_CHANNELS:
        return make_spread_problem(name, rows, context, heads, head_dim, chunk_size, generator)
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
        height = (logits.logsumexp(1, keepdim=True)) + math.log(NEEDLE / (1 - NEEDLE))
        logits.scatter_(1, place.expand(rows, 1, heads), height)
    k = normal(rows, context, 1, head_dim)
    k[..., 0, :heads] = logits
    q = off_axis / (head_dim - heads) ** 0.5 * normal(rows, heads, head_dim)
    q[:, :, :heads] = torch.eye(heads, device=device)
    v = normal(rows, context, 1, head_dim) + (name != "cancelling")
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    return Problem(head_dim**0.5 * q, k, v, lengths)


def make_spread_problem(
    name: str, rows: int, context: int, heads: int, head_dim: int, chunk_size: int, generator: torch.Generator
) -> Problem:
    """normal-S: keys of independent normal channels, logits of standard deviation S. alike: of 2, and half of a key's
    variance is its chunk's. hidden-needle: normal-1, and one token that holds a fifth of every head's softmax."""
    device = generator.device
    q, k, v = (
        torch.randn(rows, *size, head_dim, generator=generator, device=device)
        for size in ((heads,), (context, 1), (context, 1))
    )
    if name == "alike":
        shared = torch.randn(rows, -(-context // chunk_size), 1, head_dim, generator=generator, device=device)
        k = math.sqrt(0.5) * (k + shared.repeat_interleave(chunk_size, 1)[:, :context])
    deviation = {"normal-1": 1, "normal-2": 2, "normal-3": 3, "alike": 2, "hidden-needle": 1}[name]
    q = torch.nn.functional.normalize(q, dim=-1) * deviation * head_dim**0.5
    if name == "hidden-needle":
        directions = q * head_dim**-0.5
        height = (directions @ k[:, :, 0].mT).logsumexp(-1, keepdim=True) + math.log(NEEDLE / (1 - NEEDLE))
        needle = torch.linalg.pinv(directions) @ height  # the shortest key with these logits
        place = torch.randint(context, (rows,), generator=generator, device=device)
        k[torch.arange(rows, device=device), place, 0] = needle[..., 0]
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    return Problem(q, k, v + 1, lengths)
