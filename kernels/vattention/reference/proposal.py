"""Which tokens a step with a sketch reads for certain, which it may sample, and how likely each is to be drawn.

Sampling is Poisson: a token is drawn when its own random word, a hash of the seed and its place, is below its
probability. A larger probability draws all that a smaller one draws, so a sample can grow and keep what it has read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.vattention.reference.permutation import GOLDEN, WORD, mix
from dash_train.kernels.vattention.reference.population import (
    DROPPED_SHARE,
    NEEDLE_SHARE,
    VAttentionConfig,
    split_population,
    upper_bounds,
)

# Of the draws: so many follow no prediction, but are spread over the residual evenly.
EVEN_SHARE = 0.1


class SketchPopulation(NamedTuple):
    """The chunks of each KV head, bool [batch, kv_heads, chunks]; the first three are disjoint."""

    certain: Tensor  # read for certain: the set I
    residual: Tensor  # sampled from: R
    dropped: Tensor  # proved by the page bounds not to matter
    sketched: Tensor  # of the residual: those whose sketch is read


def split_for_sketch(
    q: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    chunk_bias: Tensor | None,
    bounds: tuple[Tensor, Tensor],
    config: VAttentionConfig,
) -> SketchPopulation:
    """Arguments as in vattention_decode.

    Certain are sink, window, the `heavy` chunks and the last, incomplete one. Dropped are chunks that all together
    hold at most DROPPED_SHARE of epsilon. The sketch is not read of chunks in which, for all that the bounds allow, no
    token can move the denominator by NEEDLE_SHARE of epsilon when it is drawn as rarely as a first sample without a
    sketch would draw it.
    """
    certain, residual = split_population(q, summaries, lengths, chunk_bias, None, config)[:2]
    population = certain | residual
    chunk = torch.arange(certain.shape[-1], device=q.device)
    complete = (chunk + 1) * config.chunk_size <= lengths[:, None, None]
    certain = certain | (residual & ~complete)
    residual = residual & complete

    grouped_q = q.to(compute_dtype(q.dtype)).unflatten(1, (certain.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = torch.einsum("bhgd,bchd->bhgc", grouped_q, summaries.to(grouped_q.dtype))
    bias = 0 if chunk_bias is None else chunk_bias[:, :, None]
    shown = scores + bias
    log_mass = shown.masked_fill(~(population & complete)[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
    highest = upper_bounds(grouped_q, *bounds)
    upper = (highest + bias - log_mass).amax(2)  # of a token; log_mass, one token a chunk, is a lower bound of log D
    tokens = population.sum(-1, keepdim=True).clamp(min=1) * config.chunk_size
    dropped = residual & (upper <= (DROPPED_SHARE * config.epsilon / tokens).log())
    residual = residual & ~dropped

    limit = NEEDLE_SHARE * config.epsilon * config.base_sample
    even = EVEN_SHARE / (residual.sum(-1, keepdim=True).clamp(min=1) * config.chunk_size)
    is_light = upper <= (limit * even).log()
    is_flat = (highest - scores).amax(2) <= math.log(limit)
    return SketchPopulation(certain, residual, dropped, residual & ~is_light & ~is_flat)


def token_words(key: Tensor, tokens: int) -> Tensor:
    """The random 32-bit word of every token, int64 [..., tokens], from sample_key's int64 key [...]."""
    place = torch.arange(tokens, device=key.device) * GOLDEN & WORD
    mixed = mix(place + key[..., None] & WORD)
    return mix(mixed ^ mix(key ^ GOLDEN)[..., None])


def draw(words: Tensor, probability: Tensor) -> Tensor:
    """bool: the tokens that are drawn, each with its probability."""
    return words < probability.double() * (WORD + 1)


def shares(influence: Tensor, residual: Tensor) -> Tensor:
    """The group's proposal [batch, kv_heads, tokens], sum 1 over the residual.

    influence [batch, kv_heads, group, tokens] is how much each token is expected to move each head. For a given
    number of draws the sum over heads of the variances, sum of influence^2 / probability, is least for the root of the
    sum of squares.
    """
    size = residual.sum(-1, keepdim=True).clamp(min=1)
    mixed = influence.square().sum(2).sqrt()
    total = mixed.sum(-1, keepdim=True)
    followed = torch.where(total > 0, mixed / total, residual / size)
    return (1 - EVEN_SHARE) * followed + EVEN_SHARE * residual / size
