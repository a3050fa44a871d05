"""DashAttention a second time, token by token and head by head, straight from the definition, for comparisons.

Nothing here is shared with kernels/: thresholds are found by trying every support size, gradients come from autograd.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trace:
    """What the routing did on the way: to choose test inputs away from its edges, and to freeze its normalisers."""

    normalizers: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # by batch, KV head, token
    margin: float = float("inf")  # least |z - tau|
    pbar: float = float("inf")  # least pbar in a routed set


def entmax15(scores: Tensor) -> tuple[Tensor, Tensor]:
    """p and tau of one row."""
    z = scores / 2
    descending = z.sort(descending=True).values
    for n in range(1, len(z) + 1):
        mean = descending[:n].mean()
        spread = 1 / n - (descending[:n] - mean).square().mean()
        if spread < 0:
            continue
        tau = mean - spread.sqrt()
        if descending[n - 1] > tau and (n == len(z) or descending[n] <= tau):
            return (z - tau).clamp(min=0).square(), tau
    raise AssertionError("no support solves the row")


def dense_dash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    routing_block: int = 1,
    routing_window: int = 1,
    router_q: Tensor | None = None,
    document_starts: Tensor | None = None,
    normalizers: dict[tuple[int, int, int], Tensor] | None = None,
) -> tuple[Tensor, Trace]:
    """The output like q, and the trace. `normalizers` takes the place of those of this call.

    router_q [batch, blocks, heads, head_dim] takes the place of the means of routing_window queries.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    trace = Trace()
    rows = []
    for b in range(batch):
        for t in range(seq):
            start = 0 if document_starts is None else int(document_starts[b, t])
            for g in range(kv_heads):
                first = start + (t - start) // routing_block * routing_block  # of the token's block
                window = q[b, max(start, first - routing_window + 1) : first + 1]
                router = window.mean(0) if router_q is None else router_q[b, first // routing_block]
                group, router = (x.view(kv_heads, -1, head_dim)[g] for x in (q[b, t], router))
                keys, values = k[b, : t + 1, g], v[b, : t + 1, g]
                bias, seen = _chunk_bias(router, keys, chunk_query[g], start, t, chunk_size, routing_scale, trace)
                routed = [c for c in bias if c != t // chunk_size]
                if routed and prior_normalizer != "none":
                    logs = torch.stack([bias[c] for c in routed])
                    normalizer = (logs.mean() if prior_normalizer == "geometric_mean" else logs.max()).detach()
                    trace.normalizers[b, g, t] = normalizer
                    if normalizers is not None:
                        normalizer = normalizers[b, g, t]
                    for c in routed:
                        bias[c] = (bias[c] - normalizer) / prior_temperature
                scores = keys[seen] @ group.T / head_dim**0.5
                scores = scores + torch.stack([bias[int(j) // chunk_size] for j in seen])[:, None]
                rows.append(scores.softmax(0).T @ values[seen])
    return torch.stack(rows).view(batch, seq, heads, head_dim), trace


def _chunk_bias(
    router: Tensor, keys: Tensor, w: Tensor, start: int, t: int, chunk_size: int, routing_scale: float, trace: Trace
) -> tuple[dict[int, Tensor], Tensor]:
    """log pbar of each routed chunk, 0 for the own one; and the positions of all their tokens."""
    own = t // chunk_size
    bias = {own: keys.new_zeros(())}
    eligible = range(start // chunk_size, own)
    if eligible:
        chunks = [keys[c * chunk_size : (c + 1) * chunk_size] for c in eligible]
        a = keys.shape[1] ** -0.5
        summaries = torch.stack([(chunk @ w * a).softmax(0) @ chunk for chunk in chunks])
        rows = []
        for query in router:
            scores = routing_scale * a * (summaries @ query)
            p, tau = entmax15(scores)
            trace.margin = min(trace.margin, float((scores / 2 - tau).detach().abs().min()))
            rows.append(p)
        pbar = torch.stack(rows).mean(0)
        for c, mean in zip(eligible, pbar, strict=True):
            if mean > 0:
                trace.pbar = min(trace.pbar, float(mean.detach()))
                bias[c] = mean.log() if mean >= 1e-6 else mean.clamp(min=1e-20).log().detach()
    seen = [j for j in range(start, t + 1) if j // chunk_size in bias]
    return bias, torch.tensor(seen)
