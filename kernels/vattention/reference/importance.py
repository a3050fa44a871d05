"""The sampler with a sketch in plain torch: tokens are drawn as often as their sketches make them matter.

Symbols: I, the tokens read for certain; R, the residual; w = exp(logit), a head's weights; e, what the sketch expects
of w; p, a token's probability of being drawn; S, the tokens drawn. Weights are in units of a head's predicted
denominator. With A the sum of w over I, denominator and output are estimated by

    D = A + T,   T = s sum_R e + sum_S (w - s e) / p,
    o = (sum_I w v + T u) / D,   u = sum_S (w v / p) / sum_S (w / p).

T is unbiased whatever the sketch says, as e is known of every token; the slope s only makes its variance small. A token
moves D by y = w - s e and o, to first order, by x = w (v - u) + y (u - o), so their variances are the sums over R of
(1 - p) / p times y^2 or |x|^2, relative to D^2. docs/vattention.md has the derivation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.vattention.reference.attention import VAttentionReport
from dash_train.kernels.vattention.reference.limits import squared_quantile, upper_limit
from dash_train.kernels.vattention.reference.permutation import sample_key
from dash_train.kernels.vattention.reference.population import NEEDLE_SHARE, VAttentionConfig
from dash_train.kernels.vattention.reference.proposal import SketchPopulation, draw, shares, token_words
from dash_train.kernels.vattention.reference.sketch import Prediction, predict_weights

# A sample grows twice. The few tokens of the first one set the variance an upper limit, at so many standard deviations
# of its estimate (95 %). The second time all tokens read so far estimate it: a check, which seldom asks for more. A
# limit here as well would read no less, and bias the result: what is read would depend more on what was read.
GROWTHS = (1.645, 0.0)
BALANCINGS = 3  # of the heads' parts in the group's proposal, by which heads the sample is too good for
HALVINGS = 20  # of the interval in which the sample's size is searched
# Of the sample: so many tokens must stay uncertain for it to tell of those that it lacks, or everything is read.
UNCERTAIN = 4


class Weights(NamedTuple):
    """Of all tokens, [batch, kv_heads, group, capacity], in units of the predicted denominator; all but the first are
    0 outside the residual and at most 1, whatever the moments say."""

    weight: Tensor  # w
    expected: Tensor  # e
    influence: Tensor  # what the sketch expects of w's root mean square
    most: Tensor  # the largest that w can be


class Certain(NamedTuple):
    """Sums over I, in units of the predicted denominator."""

    mass: Tensor  # [batch, kv_heads, group]: of w
    values: Tensor  # [batch, kv_heads, group, head_dim]: of w v
    tokens: Tensor  # [batch, kv_heads]
    squares: Tensor  # [batch, kv_heads]: of |v|^2


class Sample(NamedTuple):
    """The tokens drawn, padded with tokens of weight 0 and probability 1."""

    weight: Tensor  # w [batch, kv_heads, group, drawn]
    expected: Tensor  # e, likewise
    influence: Tensor  # what the sketch expects of w's root mean square, likewise
    v: Tensor  # [batch, kv_heads, drawn, head_dim]
    place: Tensor  # int64 [batch, kv_heads, drawn]
    is_drawn: Tensor  # bool, likewise


class Estimate(NamedTuple):
    """What a sample says of each head."""

    slope: Tensor  # s [batch, kv_heads, group]
    mass: Tensor  # D, likewise
    residual_out: Tensor  # u [batch, kv_heads, group, head_dim]
    out: Tensor  # o, likewise


def vattention_sketch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chunk_bias: Tensor | None,
    seed: Tensor,
    population: SketchPopulation,
    sketch: Tensor,
    bounds: tuple[Tensor, Tensor],
    config: VAttentionConfig,
) -> tuple[Tensor, VAttentionReport]:
    """Arguments as in vattention_decode; seed int64 [batch]; bounds are finite."""
    kv_heads, capacity = k.shape[2], k.shape[1]
    is_written = torch.arange(capacity, device=q.device) < lengths[:, None, None]
    k, v = (x.to(compute_dtype(x.dtype)).transpose(1, 2).masked_fill(~is_written[..., None], 0) for x in (k, v))
    grouped_q = q.to(k.dtype).unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5
    logits = grouped_q @ k.mT
    seen = predict_weights(grouped_q, sketch, bounds, population.sketched, config.chunk_size)
    if chunk_bias is not None:
        bias = _per_token(chunk_bias, capacity, config)[:, :, None].to(k.dtype)
        logits, seen = logits + bias, Prediction(*(x + bias for x in seen))
    certain, residual, dropped, sketched = (_per_token(x, capacity, config) & is_written for x in population)

    weights = weigh(logits, seen, certain, residual)
    read = read_certain(weights.weight, v, certain)
    expected_mass = weights.expected.sum(-1)
    words = token_words(sample_key(seed, kv_heads), capacity)
    n_s = residual.sum(-1, keepdim=True)
    share = shares(weights.influence, residual)
    probability = grow(torch.zeros_like(share), n_s.clamp(1, config.base_sample).to(share.dtype).log(), share)
    for confidence in GROWTHS:
        sample = gather(draw(words, probability) & residual, weights, v)
        probability = enough(probability, sample, read, weights, residual, confidence, config)
    dense = probability.sum(-1) > config.max_sample * n_s[..., 0]

    drawn = draw(words, probability) & residual
    sample = gather(drawn & ~dense[..., None], weights, v)
    p = chances(sample, probability)
    estimate = estimate_from(sample, p, read, expected_mass)
    everything = certain | residual | dropped
    exact = logits.masked_fill(~everything[:, :, None], -torch.inf).softmax(-1) @ v
    out = torch.where(dense[..., None, None], exact, estimate.out)
    tokens_read = torch.where(dense, everything.sum(-1), (certain | drawn).sum(-1))
    report = VAttentionReport(
        tokens_read.int(),
        tokens_read / everything.sum(-1),
        half_widths(sample, p, estimate, read, config).masked_fill(dense[..., None], 0).flatten(1).float(),
        dense,
        unbounded_chunks(weights.most, probability, config).masked_fill(dense, 0).int(),
        sketched.sum(-1) * sketch.shape[-1],
    )
    return out.flatten(1, 2).to(q.dtype), report


def weigh(logits: Tensor, seen: Prediction, certain: Tensor, residual: Tensor) -> Weights:
    """Weights and what the sketch tells of them, relative to the sum of those read for certain and those expected."""
    certain, residual = certain[:, :, None], residual[:, :, None]
    scale = torch.logaddexp(
        logits.masked_fill(~certain, -torch.inf).logsumexp(-1, keepdim=True),
        seen.mean.masked_fill(~residual, -torch.inf).logsumexp(-1, keepdim=True),
    )
    expected = ((x - scale).clamp(max=0).exp() * residual for x in seen)
    return Weights((logits - scale).exp(), *expected)


def read_certain(weight: Tensor, v: Tensor, certain: Tensor) -> Certain:
    """The sums over bool certain [batch, kv_heads, capacity]."""
    weight = weight * certain[:, :, None]
    return Certain(weight.sum(-1), weight @ v, certain.sum(-1), (v.square().sum(-1) * certain).sum(-1))


def unbounded_chunks(most: Tensor, probability: Tensor, config: VAttentionConfig) -> Tensor:
    """How many chunks of each KV head have a token that, if it is as heavy as its code allows, moves some head's
    denominator by more than NEEDLE_SHARE of epsilon when it is drawn."""
    could = ((most > NEEDLE_SHARE * config.epsilon * probability[:, :, None]) & (probability < 1)[:, :, None]).any(2)
    padded = torch.nn.functional.pad(could, (0, -could.shape[-1] % config.chunk_size))
    return padded.unflatten(-1, (-1, config.chunk_size)).any(-1).sum(-1)


def gather(drawn: Tensor, weights: Weights, v: Tensor) -> Sample:
    """The tokens drawn, bool [batch, kv_heads, capacity], in front; as many as the KV head with the most has."""
    count = int(drawn.sum(-1).max())
    place = drawn.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    is_drawn = drawn.gather(-1, place)
    across = place[:, :, None].expand(-1, -1, weights.weight.shape[2], -1)
    weight, expected, influence = (x.gather(-1, across) * is_drawn[:, :, None] for x in weights[:3])
    values = v.gather(2, place[..., None].expand(*place.shape, v.shape[-1]))
    return Sample(weight, expected, influence, values, place, is_drawn)


def chances(sample: Sample, probability: Tensor) -> Tensor:
    """The probability of each token of the sample."""
    return probability.gather(-1, sample.place).masked_fill(~sample.is_drawn, 1)


def estimate_from(
    sample: Sample, p: Tensor, read: Certain, expected_mass: Tensor, slope: Tensor | None = None
) -> Estimate:
    """Denominator and output of every head from tokens drawn with probability p [batch, kv_heads, drawn].

    expected_mass: the sum of e over the residual. slope: default, that of least variance.
    """
    weight, expected, v = sample.weight, sample.expected, sample.v
    p = p[:, :, None]
    if slope is None:
        unsure = (1 - p) / p.square()
        slope = (unsure * weight * expected).sum(-1) / ((unsure * expected.square()).sum(-1)).clamp(min=1e-30)
    found = (weight / p).sum(-1)
    residual = found + slope * (expected_mass - (expected / p).sum(-1))
    residual = torch.maximum(residual, weight.sum(-1))  # never less than what was read
    residual_out = (weight / p) @ v / found.clamp(min=1e-30)[..., None]
    mass = read.mass + residual
    out = (read.values + residual[..., None] * residual_out) / mass[..., None]
    return Estimate(slope, mass, residual_out, out)


def smallest(fits: Callable[[Tensor], Tensor], share: Tensor, residual: Tensor) -> Tensor:
    """The least log-number of draws [batch, kv_heads, 1] that fits, between one draw and as many as draw everything."""
    high = torch.where(residual, share, 1).amin(-1, keepdim=True).log().neg() + 1e-3
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_enough = fits(middle)
        low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)
    return high


def enough(
    probability: Tensor,
    sample: Sample,
    read: Certain,
    weights: Weights,
    residual: Tensor,
    confidence: float,
    config: VAttentionConfig,
) -> Tensor:
    """Probabilities [batch, kv_heads, capacity], none below the sample's, that make every head's interval small enough,
    by the upper limit that the sample sets to its variance."""
    p = chances(sample, probability)
    estimate = estimate_from(sample, p, read, weights.expected.sum(-1))
    observed, predicted, quantile = error_squares(sample, p, estimate, config)
    allowed = (config.epsilon * relative_to(sample, p, estimate, read, config)).square() / quantile

    def limit(then: Tensor) -> Tensor:
        return upper_limit(observed, predicted, p, then, confidence) / allowed

    def fits(log_draws: Tensor) -> Tensor:
        then = grow(p, log_draws, of_sample)
        return (limit(then) <= 1).all(-1, keepdim=True) & ((then < 1).sum(-1, keepdim=True) >= uncertain)

    uncertain = (p < 1).sum(-1, keepdim=True).clamp(max=UNCERTAIN)
    # Alone, and were no probability limited to 1, a head would need draws in proportion to this.
    unlimited = sample.influence.clamp(min=1e-30) * p[:, :, None]
    need = (torch.maximum(observed, predicted) / unlimited).sum(-1) / allowed
    for _ in range(BALANCINGS):
        share = shares(need[..., None] * weights.influence, residual)
        of_sample = chances(sample, share)
        log_draws = smallest(fits, share, residual)
        need = need * limit(grow(p, log_draws, of_sample)).clamp(min=1e-6).sqrt()
    return grow(probability, log_draws, share)


def grow(p: Tensor, log_draws: Tensor, share: Tensor) -> Tensor:
    """Probabilities, none below p, with which so many draws would be made if none were limited to 1."""
    return torch.maximum(p, (log_draws.exp() * share).clamp(max=1))


def half_widths(sample: Sample, p: Tensor, estimate: Estimate, read: Certain, config: VAttentionConfig) -> Tensor:
    """Of the interval that holds the error with probability 1 - delta, relative to what epsilon is."""
    observed, predicted, quantile = error_squares(sample, p, estimate, config)
    variance = upper_limit(observed, predicted, p, p, 0.0)
    return (quantile * variance).sqrt() / relative_to(sample, p, estimate, read, config)


def error_squares(
    sample: Sample, p: Tensor, estimate: Estimate, config: VAttentionConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of the sample, relative to D: the square of how far it moves the result, and what the sketch
    expects of that square; and the squared quantile of the result's error, [batch, kv_heads, group]."""
    slope, mass = estimate.slope[..., None], estimate.mass[..., None]
    weight, expected = sample.weight / mass, sample.expected / mass
    surprise = weight - slope * expected
    square = (sample.influence / mass).square()
    predicted = (square + (slope.square() - 2 * slope) * expected.square()).clamp(min=0)
    if config.verify == "denominator":
        quantile = torch.full_like(estimate.mass, config.quantile**2)
        return surprise.square(), predicted, quantile
    ahead = (estimate.residual_out - estimate.out)[..., None, :]
    apart = sample.v[:, :, None] - estimate.residual_out[..., None, :]
    error = weight[..., None] * apart + surprise[..., None] * ahead
    predicted = square * apart.square().sum(-1) + predicted * ahead.square().sum(-1)
    return error.square().sum(-1), predicted, squared_quantile(error, p, config.delta)


def relative_to(sample: Sample, p: Tensor, estimate: Estimate, read: Certain, config: VAttentionConfig) -> Tensor:
    """What epsilon is relative to, [batch, kv_heads, group]: max(|o|, c rms(v)); 1 (that is, D) for the denominator."""
    if config.verify == "denominator":
        return torch.ones_like(estimate.mass)
    stands_for = sample.is_drawn / p
    squares = read.squares + (stands_for * sample.v.square().sum(-1)).sum(-1)
    rms = (squares / (read.tokens + stands_for.sum(-1)).clamp(min=1)).sqrt()
    return torch.maximum(estimate.out.norm(dim=-1), config.value_floor * rms[..., None])


def _per_token(per_chunk: Tensor, capacity: int, config: VAttentionConfig) -> Tensor:
    return per_chunk.repeat_interleave(config.chunk_size, -1)[..., :capacity]
