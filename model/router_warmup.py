"""Dense warm-up of a router: layers attend to everything while their chunk queries learn where that attention goes.

The target of a head is the share of its attention that each eligible chunk gets, without its own chunk; the routers'
entmax-1.5 over the same chunks learns it by its Fenchel-Young loss (Blondel et al., 2020, arXiv 1901.02324), whose
gradient with respect to the scores is the routers' probabilities minus the target. Queries and keys are constants to
it: full-attention weights become a Dash model without being pulled away from what they do.
"""

from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash.reference.stages import eligible_chunks, group_heads, summarize, whole_chunks
from dash_train.kernels.entmax import entmax15

SCORES = {"cpu": 2**22, "cuda": 2**27}  # of attention that are looked at per layer and forward; more are sampled


def learn_routing(
    out: Tensor,
    q: Tensor,
    router_q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    routing_scale: float,
    routing_block: int,
    positions: Tensor,
    document_starts: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`out` with a gradient for chunk_query, and how far routing is off: the share of attention (0-dim, 0 to 1) that
    the routers' probabilities would have to move.

    Args:
        out: full attention's output, any shape; its own gradient is passed on as it is.
        q: [batch, q_len, heads, head_dim]; router_q [batch, ceil(q_len / routing_block), heads, head_dim]; k [batch,
            seq, kv_heads, head_dim].
        positions: [q_len], of the queries in the row; each block of `routing_block` queries follows the one before or
            begins anew at a chunk's border.
        document_starts: [batch, seq], multiples of chunk_size.
        real: [batch, q_len] bool, None where there is no padding.
    """
    loss, error = _loss(
        q.detach(),
        router_q.detach(),
        k.detach(),
        chunk_query,
        chunk_size=chunk_size,
        routing_scale=routing_scale,
        routing_block=routing_block,
        positions=positions,
        starts=document_starts[:, positions],
        real=real,
    )
    return _WithLoss.apply(out, loss), error


def _loss(
    q: Tensor,
    router_q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    routing_scale: float,
    routing_block: int,
    positions: Tensor,
    starts: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kv_heads, heads = k.shape[2], q.shape[2]
    keys = whole_chunks(k, chunk_size)
    block, tokens = _sample(q, keys.shape[2], heads, routing_block)
    positions, starts = positions[tokens][None], starts[:, tokens]
    first = slice(None, None, routing_block)
    eligible = eligible_chunks(positions[:, first], starts[:, first], keys.shape[2] // chunk_size, chunk_size)
    counts = eligible.any(-1)
    if real is not None:
        counts = counts & real[:, tokens[first]]
    target = _attention_of_chunks(group_heads(q[:, tokens], kv_heads), keys, positions, starts, chunk_size)
    target = target.unflatten(3, (-1, routing_block)).mean(4) * eligible[:, None, None]
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)

    summaries = summarize(keys, chunk_query, chunk_size)
    scores = torch.einsum("bkgtd,bkcd->bkgtc", group_heads(router_q[:, block], kv_heads), summaries)
    scores = scores * (routing_scale * q.shape[-1] ** -0.5)
    with torch.no_grad():
        p = entmax15(scores.masked_fill(~eligible[:, None, None], -torch.inf))
        gradient = (p - target) * counts[:, None, None, :, None]
        number = counts.sum().clamp(min=1) * heads
        error = gradient.abs().sum() / 2 / number
    return (scores * gradient).sum() / number, error


def _sample(q: Tensor, keys: int, heads: int, routing_block: int) -> tuple[Tensor, Tensor]:
    """Routing blocks, evenly spread over all whole ones, and their tokens."""
    blocks = q.shape[1] // routing_block
    budget = SCORES.get(q.device.type, 2**24) // (len(q) * keys * heads * routing_block)
    chosen = torch.linspace(0, blocks - 1, max(1, min(blocks, budget)), device=q.device).round().long()
    tokens = chosen[:, None] * routing_block + torch.arange(routing_block, device=q.device)
    return chosen, tokens.flatten()


@torch.no_grad()
def _attention_of_chunks(q: Tensor, keys: Tensor, positions: Tensor, starts: Tensor, chunk_size: int) -> Tensor:
    """The share of each head's attention that every chunk gets, [batch, kv_heads, group, tokens, chunks]."""
    token = torch.arange(keys.shape[2], device=q.device)
    seen = (token <= positions[..., None]) & (token >= starts[..., None])
    scores = torch.einsum("bkgtd,bksd->bkgts", q * q.shape[-1] ** -0.5, keys)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return weights.unflatten(-1, (-1, chunk_size)).sum(-1)


class _WithLoss(torch.autograd.Function):
    """A tensor as it is, whose backward pass also begins that of a loss."""

    @staticmethod
    def forward(_ctx: Any, out: Tensor, _loss: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(_ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        return grad_out, grad_out.new_ones((), dtype=torch.float32)
