"""vAttention (arXiv 2510.05688) in plain torch: the definition that the Triton path must match.

Symbols: I, the tokens read for certain; R, the residual, of n_s tokens; m, the base sample; b, the whole sample, m
included. Logits are s = q.k / sqrt(head_dim) + the log-prior of the key's chunk, weights w = exp(s); D and o are a
head's denominator and output. A sampled token stands for n_s / b tokens. Masks of tokens are
[batch, kv_heads, capacity].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.vattention.reference.permutation import permute, sample_key
from dash_train.kernels.vattention.reference.population import Population, VAttentionConfig


class VAttentionReport(NamedTuple):
    """What a decoding step read, and how sure it is of its output."""

    tokens_read: Tensor  # [batch, kv_heads] int32, distinct tokens
    density: Tensor  # [batch, kv_heads] fp32: tokens_read / tokens of the population
    half_width: Tensor  # [batch, heads] fp32: of the 1 - delta interval, relative; 0 when everything was read
    dense_fallback: Tensor  # [batch, kv_heads] bool: everything was read though sampling was asked for
    unbounded_chunks: Tensor  # [batch, kv_heads] int32: chunks left to sampling that could hide a needle, for all that
    #                           the page bounds tell: those the bounds do not exclude, or all, without bounds
    sketch_bytes: Tensor | None = None  # [batch, kv_heads] int64: bytes of the sketch that were read; None: no sketch


def vattention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chunk_bias: Tensor | None,
    seed: Tensor,
    population: Population,
    config: VAttentionConfig,
    budget: Tensor | None = None,
) -> tuple[Tensor, VAttentionReport]:
    """Arguments as in vattention_decode; seed int64 [batch]. budget int64 [batch, kv_heads] takes the place of b."""
    kv_heads, capacity = k.shape[2], k.shape[1]
    is_written = torch.arange(capacity, device=q.device) < lengths[:, None, None]
    k, v = (x.to(compute_dtype(x.dtype)).transpose(1, 2).masked_fill(~is_written[..., None], 0) for x in (k, v))
    logits = q.to(k.dtype).unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5 @ k.mT
    if chunk_bias is not None:
        logits = logits + _per_token(chunk_bias, capacity, config)[:, :, None].to(k.dtype)
    certain, residual, dropped = (_per_token(x, capacity, config) & is_written for x in population[:3])

    draw = draw_order(residual, sample_key(seed, kv_heads))
    n_s = residual.sum(-1)
    m = n_s.clamp(max=config.base_sample)
    base = draw < m[..., None]
    estimate, log_mass = attend(logits, v, certain, base, n_s, m)
    distance = torch.cdist(estimate, v, compute_mode="donot_use_mm_for_euclid_dist")  # |v - o|
    floor = output_floor(estimate, v, base, m, config)
    if budget is None:
        variance = sample_variance(logits, log_mass, v, estimate, distance, base, m, config)
        budget = torch.maximum(needed_sample(variance, floor, n_s, config), population.least_sample)
    b = torch.maximum(budget, m)
    dense = (n_s > 0) & (b.clamp(min=config.base_sample) > config.max_sample * n_s)
    b = torch.minimum(b, n_s)

    sample = draw < b[..., None]
    all_tokens = certain | residual | dropped
    out, log_mass = attend(logits, v, torch.where(dense[..., None], all_tokens, certain), sample, n_s, b)
    variance = sample_variance(logits, log_mass, v, estimate, distance, sample, b, config)
    half_width = half_widths(variance, output_floor(out, v, base, m, config), n_s, b, config)
    tokens_read = torch.where(dense, all_tokens.sum(-1), certain.sum(-1) + b)
    report = VAttentionReport(
        tokens_read.int(),
        tokens_read / all_tokens.sum(-1),
        half_width.masked_fill(dense[..., None], 0).flatten(1).float(),
        dense,
        population.unbounded.masked_fill(dense, 0).int(),
    )
    return out.flatten(1, 2).to(q.dtype), report


def draw_order(residual: Tensor, key: Tensor) -> Tensor:
    """When each token of the residual is drawn, from 0; past every sample for the others."""
    capacity = residual.shape[-1]
    n_s = residual.sum(-1, keepdim=True)
    turn = torch.arange(capacity, device=residual.device).expand(residual.shape)
    place = permute(turn, n_s.clamp(min=1), key[..., None])
    place = torch.where(turn < n_s, place, turn)
    turn_of_place = torch.empty_like(place).scatter_(-1, place, turn)
    draw = turn_of_place.gather(-1, (residual.cumsum(-1) - 1).clamp(min=0))
    return torch.where(residual, draw, capacity)


def attend(
    logits: Tensor, v: Tensor, certain: Tensor, sample: Tensor, n_s: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [batch, kv_heads, group, head_dim] and log D, sampled tokens standing for n_s / count each."""
    log_factor = (n_s.to(v.dtype) / count).log()[..., None]
    log_factor = torch.where(sample, log_factor, -torch.inf).masked_fill(certain, 0)
    logits = logits + log_factor[:, :, None]
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def sample_variance(
    logits: Tensor,
    log_mass: Tensor,
    v: Tensor,
    centre: Tensor,
    distance: Tensor,
    sample: Tensor,
    count: Tensor,
    config: VAttentionConfig,
) -> Tensor:
    """Over the sampled tokens, in units of D squared: sum over channels of var(w (v - centre)), or var(w)."""
    w = (logits - log_mass[..., None]).exp() * sample[:, :, None]
    count = count[..., None]
    if config.verify == "denominator":
        squares, total = w.square().sum(-1), w.sum(-1).square()
    else:
        squares = (w * distance).square().sum(-1)
        total = (w @ v - w.sum(-1, keepdim=True) * centre).square().sum(-1)
    return ((squares - total / count) / (count - 1).clamp(min=1)).clamp(min=0)


def output_floor(out: Tensor, v: Tensor, base: Tensor, m: Tensor, config: VAttentionConfig) -> Tensor:
    """What epsilon is relative to, [batch, kv_heads, group]: max(|o|, c rms(v)); 1 (that is, D) for the denominator."""
    if config.verify == "denominator":
        return torch.ones_like(out[..., 0])
    rms = ((v.square().sum(-1) * base).sum(-1) / m.clamp(min=1)).sqrt()
    return torch.maximum(out.norm(dim=-1), config.value_floor * rms[..., None])


def needed_sample(variance: Tensor, floor: Tensor, n_s: Tensor, config: VAttentionConfig) -> Tensor:
    """b [batch, kv_heads]: (z n_s sd / (epsilon floor))^2, corrected for a finite population; the group's largest."""
    smallest = 1e-30  # of nothing but zeros
    n_s = n_s[..., None].to(variance.dtype)
    inverse = (config.epsilon * floor).square() / ((config.quantile * n_s).square() * variance + smallest)
    return (1 / (inverse + 1 / n_s.clamp(min=1))).ceil().amax(-1).long()


def half_widths(variance: Tensor, floor: Tensor, n_s: Tensor, b: Tensor, config: VAttentionConfig) -> Tensor:
    """Of the interval that holds the error with probability 1 - delta, relative to the floor."""
    n_s, b = n_s[..., None].to(variance.dtype), b[..., None].to(variance.dtype)
    unread = 1 - b / n_s.clamp(min=1)
    width = config.quantile * n_s * (variance / b.clamp(min=1) * unread).sqrt() / floor
    return width.masked_fill(b >= n_s, 0)


def _per_token(per_chunk: Tensor, capacity: int, config: VAttentionConfig) -> Tensor:
    return per_chunk.repeat_interleave(config.chunk_size, -1)[..., :capacity]
