"""Which chunks a step reads for certain, which it leaves to sampling, which it drops: in plain torch.

Everything that is read for certain is whole chunks, so sink and window are rounded outwards; the last, incomplete chunk
has no summary and is never ranked. Chunks are masks here, [batch, kv_heads, chunks].
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype

# With page bounds. A sampled token may move the denominator by at most this share of epsilon,
NEEDLE_SHARE = 0.5
# so a chunk is a needle if that would take a sample of more than this share of the residual.
NEEDLE_SAMPLE = 0.05
# All dropped chunks together hold at most this share of epsilon of the denominator.
DROPPED_SHARE = 1e-3


@dataclass(frozen=True)
class VAttentionConfig:
    """The arguments of vattention_decode that are not tensors."""

    epsilon: float
    delta: float
    verify: str
    sink: int
    window: int
    heavy: float
    base_sample: int
    max_sample: float
    value_floor: float
    chunk_size: int

    @property
    def quantile(self) -> float:
        """z of the two-sided interval that holds 1 - delta of a normal distribution."""
        return NormalDist().inv_cdf(1 - self.delta / 2)


class Population(NamedTuple):
    """The chunks of each KV head, bool [batch, kv_heads, chunks]; the first three are disjoint."""

    certain: Tensor  # read for certain: the set I
    residual: Tensor  # sampled from: R
    dropped: Tensor  # proved by the page bounds not to matter
    unbounded: Tensor  # [batch, kv_heads] int64: residual chunks that could hide a needle, for all that is known
    least_sample: Tensor  # [batch, kv_heads] int64: what the bounds of the residual demand of the sample


def split_population(
    q: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    chunk_bias: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    config: VAttentionConfig,
) -> Population:
    """Sink, window, the heaviest chunks by their summaries and the needles that bounds show; arguments as in decode."""
    batch, chunks, kv_heads, head_dim = summaries.shape
    grouped_q = q.to(compute_dtype(q.dtype)).unflatten(1, (kv_heads, -1)) * head_dim**-0.5
    chunk = torch.arange(chunks, device=q.device)
    length = lengths[:, None, None]
    if chunk_bias is None:
        chunk_bias = grouped_q.new_zeros(batch, kv_heads, chunks)
    population = (chunk * config.chunk_size < length) & (chunk_bias > -torch.inf)
    complete = population & ((chunk + 1) * config.chunk_size <= length)

    scores = torch.einsum("bhgd,bchd->bhgc", grouped_q, summaries.to(grouped_q.dtype)) + chunk_bias[:, :, None]
    scores = scores.masked_fill(~complete[:, :, None], -torch.inf)
    log_mass = scores.logsumexp(-1, keepdim=True)  # of the summaries: each stands for one token of its chunk
    rank = (scores - log_mass).amax(2)  # a chunk's share of the mass, in the head in which it is largest

    end = torch.minimum((chunk + 1) * config.chunk_size, length)
    is_near = (chunk * config.chunk_size < config.sink) | (end > length - config.window)
    certain = population & is_near
    wanted = (population.sum(-1, keepdim=True) * config.heavy + 0.5).floor()
    certain = certain | _top(rank, complete & ~certain, wanted)
    if bounds is None:
        residual = population & ~certain
        nothing = torch.zeros_like(certain)
        return Population(certain, residual, nothing, residual.sum(-1), nothing.sum(-1))

    # The summaries' log-mass counts one token a chunk: a lower bound of log D. With a whole chunk for each it is a good
    # estimate (for mean keys still a lower bound), and a token of weight w needs n_s w / D / limit tokens of sample.
    upper = (upper_bounds(grouped_q, *bounds) + chunk_bias[:, :, None] - log_mass).amax(2)
    limit = NEEDLE_SHARE * config.epsilon * config.chunk_size
    tokens = population.sum(-1, keepdim=True).clamp(min=1) * config.chunk_size
    is_open = population & ~certain
    needles = is_open & complete & (upper > math.log(NEEDLE_SAMPLE * limit))
    is_proof = needles.sum(-1, keepdim=True) <= config.max_sample * is_open.sum(-1, keepdim=True)
    certain = certain | torch.where(is_proof, needles, _top(upper, needles, wanted))
    dropped = is_open & complete & (upper <= (DROPPED_SHARE * config.epsilon / tokens).log())
    residual = population & ~certain & ~dropped
    unbounded = residual & (needles | ~complete)
    largest = upper.masked_fill(~(residual & complete), -torch.inf).amax(-1).exp()
    least_sample = (residual.sum(-1) * config.chunk_size * largest / limit).ceil()
    least_sample = least_sample.clamp(max=2**31 - 1).long() * is_proof[..., 0]
    return Population(certain, residual, dropped, unbounded.sum(-1), least_sample)


def _top(rank: Tensor, candidates: Tensor, wanted: Tensor) -> Tensor:
    """The `wanted` [batch, kv_heads, 1] candidates of the highest rank, of equal ones the first."""
    order = rank.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return candidates & (place < wanted)


def upper_bounds(grouped_q: Tensor, k_min: Tensor, k_max: Tensor) -> Tensor:
    """The largest logit [batch, kv_heads, group, chunks] of any key between a chunk's k_min and k_max."""
    at_max = torch.einsum("bhgd,bchd->bhgc", grouped_q.clamp(min=0), k_max.to(grouped_q.dtype))
    return at_max + torch.einsum("bhgd,bchd->bhgc", grouped_q.clamp(max=0), k_min.to(grouped_q.dtype))
