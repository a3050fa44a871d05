"""The three stages of DashAttention in plain torch, for one block of query rows: the definition kernels must match.

Follows docs/kernels.md line by line. Heads are grouped here: q is [batch, kv_heads, group, rows, head_dim], k and v are
[batch, kv_heads, keys, head_dim] with `keys` a whole number of chunks, summaries [batch, kv_heads, chunks, head_dim].
Positions and document starts count from the first of these keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.entmax import probability, relative_to_max, threshold15, threshold15_on

PBAR_MIN = 1e-20  # log pbar is taken of at least this
PBAR_GRADIENT_MIN = 1e-6  # below it log pbar gets no gradient: 1 / pbar would explode


class Rows(NamedTuple):
    """What one block of query rows works on."""

    q: Tensor
    k: Tensor
    v: Tensor
    summaries: Tensor
    positions: Tensor  # [1 or batch, rows]
    starts: Tensor  # [1 or batch, rows]: where each row's document begins
    support: Tensor | None  # bool [batch, kv_heads, group, rows, chunks], when it is given
    router_q: Tensor | None = None  # the routers' queries, one a routing block of rows; None: q


class Routing(NamedTuple):
    """Stage 1 of some rows: `blocks` routing blocks of them."""

    pbar: Tensor  # [batch, kv_heads, blocks, chunks]: mean of p over the group
    routed: Tensor  # the same shape, bool: R(t)
    support: Tensor  # [batch, kv_heads, group, blocks, chunks] bool: r > 0
    tau: Tensor  # [batch, kv_heads, group, blocks], relative to row_max
    row_max: Tensor  # [batch, kv_heads, group, blocks], of z
    residual: Tensor  # scalar: worst |sum p - 1|


def group_heads(q: Tensor, kv_heads: int) -> Tensor:
    """[batch, q_len, heads, head_dim] -> [batch, kv_heads, group, q_len, head_dim] in the computing type."""
    q = q.to(compute_dtype(q.dtype)).unflatten(2, (kv_heads, -1))
    return q.permute(0, 2, 3, 1, 4).contiguous()


def whole_chunks(k: Tensor, chunk_size: int) -> Tensor:
    """[batch, seq, kv_heads, head_dim] -> [batch, kv_heads, keys, head_dim]: the last chunk is filled up with zeros."""
    k = k.to(compute_dtype(k.dtype)).transpose(1, 2)
    return F.pad(k, (0, 0, 0, -k.shape[2] % chunk_size)).contiguous()


def summarize(k: Tensor, chunk_query: Tensor, chunk_size: int) -> Tensor:
    """Stage 0: ktilde_c = sum_j softmax_j(w.k_j / sqrt(head_dim)) k_j over the keys of each chunk."""
    chunks = k.unflatten(2, (-1, chunk_size))
    logits = torch.einsum("bhcjd,hd->bhcj", chunks, chunk_query.to(k.dtype)) * k.shape[-1] ** -0.5
    return torch.einsum("bhcj,bhcjd->bhcd", logits.softmax(-1), chunks)


def eligible_chunks(positions: Tensor, starts: Tensor, chunks: int, chunk_size: int) -> Tensor:
    """bool [1 or batch, rows, chunks]: the chunks before each row's own, back to the first of its document."""
    chunk = torch.arange(chunks, device=positions.device)
    return (chunk < positions[..., None] // chunk_size) & (chunk >= starts[..., None] // chunk_size)


def route(
    q: Tensor, summaries: Tensor, eligible: Tensor, routing_scale: float, support: Tensor | None = None
) -> Routing:
    """Stage 1: p = entmax-1.5(s) over the eligible chunks, each head by itself, then pbar, its mean over the group."""
    scores = q.flatten(2, 3) @ summaries.mT * (routing_scale * q.shape[-1] ** -0.5)
    scores = scores.unflatten(2, q.shape[2:4]).masked_fill(~eligible[:, None, None], -torch.inf)
    with torch.no_grad():
        z, row_max = relative_to_max(scores / 2)
        if support is None:
            tau = threshold15(z)
            root = (z - tau).clamp(min=0)
            support = root > 0
        else:
            tau = threshold15_on(z, support)
            root = (z - tau).clamp(min=0).masked_fill(~support, 0)
        error = (root.square().sum(-1) - 1).abs()
        residual = error.masked_fill(~eligible.any(-1)[:, None, None], 0).amax()
    pbar = probability(scores, root).mean(2)
    return Routing(pbar, support.any(2), support, tau.squeeze(-1), row_max.squeeze(-1), residual)


def route_rows(rows: Rows, config: DashConfig) -> Routing:
    """Stage 1, once a routing block: the tokens of a block have the same eligible chunks."""
    first = slice(None, None, config.routing_block)
    positions, starts = rows.positions[:, first], rows.starts[:, first]
    eligible = eligible_chunks(positions, starts, rows.summaries.shape[2], config.chunk_size)
    q = rows.q if rows.router_q is None else rows.router_q
    support = None if rows.support is None else rows.support[:, :, :, first]
    return route(q, rows.summaries, eligible, config.routing_scale, support)


def temperature(config: DashConfig) -> float:
    """What the log-prior is divided by: 1 without a normalizer."""
    return 1.0 if config.prior_normalizer == "none" else config.prior_temperature


def log_prior(routing: Routing, config: DashConfig) -> tuple[Tensor, Tensor]:
    """b_c of every chunk (-inf outside R), and the normaliser [batch, kv_heads, blocks] that it contains."""
    log_pbar = routing.pbar.clamp(min=PBAR_MIN).log()
    log_pbar = torch.where(routing.pbar < PBAR_GRADIENT_MIN, log_pbar.detach(), log_pbar)
    with torch.no_grad():
        if config.prior_normalizer == "geometric_mean":
            size = routing.routed.sum(-1).clamp(min=1)
            normalizer = log_pbar.masked_fill(~routing.routed, 0).sum(-1) / size
        elif config.prior_normalizer == "peak":
            peak = log_pbar.masked_fill(~routing.routed, -torch.inf).amax(-1)
            normalizer = peak.masked_fill(peak == -torch.inf, 0)
        else:
            normalizer = torch.zeros_like(log_pbar[..., 0])
    prior = (log_pbar - normalizer[..., None]) / temperature(config)
    return prior.masked_fill(~routing.routed, -torch.inf), normalizer


def token_bias(prior: Tensor, positions: Tensor, chunk_size: int) -> Tensor:
    """The prior of each token's chunk, -inf after the row's own token: [batch, kv_heads, rows, keys]."""
    bias = prior[..., None].expand(*prior.shape, chunk_size).flatten(-2)
    token = torch.arange(bias.shape[-1], device=prior.device)
    return bias.masked_fill(token > positions[:, None, :, None], -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, prior: Tensor, positions: Tensor, chunk_size: int) -> Tensor:
    """Stage 2: softmax over the tokens up to each row's own of (q.k / sqrt(head_dim) + prior of the token's chunk)."""
    bias = token_bias(prior, positions, chunk_size)
    scores = (q * q.shape[-1] ** -0.5).flatten(2, 3) @ k.mT
    weights = (scores.unflatten(2, q.shape[2:4]) + bias[:, :, None]).softmax(-1)
    return (weights.flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
