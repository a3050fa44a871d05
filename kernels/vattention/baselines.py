"""Other ways to decode, for study: inputs and report of vattention_decode, in plain torch at reference speed.

None but `full` bounds its error, so their half_width is NaN. All but `full` read sink and window for certain.
Selections are per query head, but for the sample; tokens_read counts the union over the group.
"""

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.vattention.decode import chunk_means
from dash_train.kernels.vattention.reference.attention import VAttentionReport, draw_order
from dash_train.kernels.vattention.reference.permutation import sample_key


def full(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> tuple[Tensor, VAttentionReport]:
    """Exact attention over the whole cache; shapes as in vattention_decode."""
    logits = _logits(q, k_cache, lengths)
    out, report = _attend(logits, logits > -torch.inf, v_cache, q)
    return out, report._replace(half_width=torch.zeros_like(report.half_width))


def oracle_top_k(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    share: float = 0.1,
    sink: int = 128,
    window: int = 128,
) -> tuple[Tensor, VAttentionReport]:
    """The tokens of the largest logits, `share` of all."""
    logits = _logits(q, k_cache, lengths)
    first = logits.masked_fill(_near(logits, lengths, sink, window), torch.inf)
    return _attend(logits, _largest(first, _count(lengths, share)), v_cache, q)


def oracle_top_p(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mass: float = 0.9,
    sink: int = 128,
    window: int = 128,
) -> tuple[Tensor, VAttentionReport]:
    """The fewest tokens that hold `mass` of the softmax, beside sink and window."""
    logits = _logits(q, k_cache, lengths)
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    is_needed = ordered.cumsum(-1) - ordered < mass
    chosen = torch.zeros_like(is_needed).scatter_(-1, order, is_needed)
    return _attend(logits, chosen | _near(logits, lengths, sink, window), v_cache, q)


def uniform_sample(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    share: float = 0.1,
    sink: int = 128,
    window: int = 128,
    seed: int = 0,
) -> tuple[Tensor, VAttentionReport]:
    """Sink, window and a sample of the rest, shared by the group and weighted by its inverse probability."""
    logits = _logits(q, k_cache, lengths)
    kv_heads = k_cache.shape[2]
    near = _near(logits, lengths, sink, window)[:, :, 0].expand(-1, kv_heads, -1)
    residual = (logits[:, :, 0] > -torch.inf) & ~near
    seeds = torch.full((len(q),), seed, dtype=torch.int64, device=q.device)
    draw = draw_order(residual, sample_key(seeds, kv_heads))
    count = (_count(lengths, share)[..., 0] - near.sum(-1)).clamp(min=1)
    sampled = draw < count[..., None]
    factor = residual.sum(-1) / sampled.sum(-1).clamp(min=1)
    weighted = logits + torch.where(sampled, factor[..., None].log(), 0)[:, :, None]
    return _attend(weighted, (sampled | near)[:, :, None].expand_as(logits), v_cache, q)


def summary_top_k(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    share: float = 0.1,
    sink: int = 128,
    window: int = 128,
    summaries: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, VAttentionReport]:
    """The chunks whose summaries (default: mean keys) have the largest logits, `share` of all tokens."""
    logits = _logits(q, k_cache, lengths)
    if summaries is None:
        summaries = chunk_means(k_cache, chunk_size)
    complete = lengths // chunk_size * chunk_size
    scores = _logits(q, summaries.repeat_interleave(chunk_size, 1)[:, : k_cache.shape[1]], complete)
    scores = scores.masked_fill(_near(logits, lengths, sink, window), torch.inf)
    return _attend(logits, _largest(scores, _count(lengths, share)) & (logits > -torch.inf), v_cache, q)


def _logits(q: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """[batch, kv_heads, group, tokens], -inf beyond a row's length."""
    keys = keys.to(compute_dtype(q.dtype)).permute(0, 2, 3, 1)
    logits = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5 @ keys
    position = torch.arange(logits.shape[-1], device=q.device)
    return logits.masked_fill(position >= lengths[:, None, None, None], -torch.inf)


def _near(logits: Tensor, lengths: Tensor, sink: int, window: int) -> Tensor:
    """bool [batch, 1, 1, tokens]: sink and window."""
    position = torch.arange(logits.shape[-1], device=logits.device)
    length = lengths[:, None, None, None]
    return ((position < sink) | (position >= length - window)) & (position < length)


def _count(lengths: Tensor, share: float) -> Tensor:
    """Tokens that a share is, [batch, 1, 1], at least one."""
    return (lengths * share).round().clamp(min=1).long()[:, None, None]


def _largest(logits: Tensor, count: Tensor) -> Tensor:
    """bool like logits: the count largest of each row."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    turn = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, turn) < count[..., None]


def _attend(logits: Tensor, chosen: Tensor, v_cache: Tensor, q: Tensor) -> tuple[Tensor, VAttentionReport]:
    weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    beyond = (logits == -torch.inf).all(2).all(1)[..., None, None]
    out = weights @ v_cache.to(weights.dtype).masked_fill(beyond, 0).transpose(1, 2)
    tokens_read = (chosen & (logits > -torch.inf)).any(2).sum(-1)
    nothing = torch.zeros_like(tokens_read)
    report = VAttentionReport(
        tokens_read=tokens_read.int(),
        density=tokens_read / (logits[:, :, 0] > -torch.inf).sum(-1),
        half_width=torch.full(q.shape[:2], torch.nan, device=q.device),
        dense_fallback=nothing.bool(),
        unbounded_chunks=nothing.int(),
    )
    return out.flatten(1, 2).to(q.dtype), report
