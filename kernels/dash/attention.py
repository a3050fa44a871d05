"""The public function: checks its arguments and hands them to a backend."""

from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash.checks import BACKENDS, check_choice, check_heads, check_numbers, check_positions
from dash_train.kernels.dash.reference import dash_attention_reference
from dash_train.kernels.dash.stages import DashConfig


def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    support: Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, DashStats) with return_stats
    """Causal DashAttention (arXiv 2605.18753; the mathematics is in docs/kernels.md), differentiable.

    Args:
        q: [batch, q_len, heads, head_dim], after RoPE. float64 is computed in float64, all else in float32.
        k, v: [batch, seq, kv_heads, head_dim], in q's type; kv_heads divides heads.
        chunk_query: [kv_heads, head_dim], the learned query that weighs a chunk's keys into its summary.
        chunk_size: tokens per chunk. seq need not be a multiple of it.
        routing_scale: factor on the routing scores; larger is sparser.
        prior_normalizer: what is subtracted from the log-probability of a routed chunk: "geometric_mean" over the
            routed chunks, "peak" (their maximum) or "none".
        prior_temperature: divides the result; unused with "none".
        document_starts: integer [batch, seq], the row position at which each token's document begins, a multiple of
            chunk_size; default one document a row.
        query_starts: q is this many equal pieces; piece i stands at positions query_starts[i], +1, ... of the row.
        support: bool [batch, heads, q_len, ceil(seq / chunk_size)], the chunks of positive probability as another
            backend found them, in place of finding them (reference only; for comparisons).
        backend: "reference" (torch), "triton" (CUDA, or CPU under TRITON_INTERPRET=1; no gradient yet) or "auto":
            triton on CUDA when no gradient is needed, else reference.
        return_stats: return (out, DashStats).

    Returns: [batch, q_len, heads, head_dim] in q's type; with return_stats also the statistics.

    Raises: ValueError naming the argument, what it is and what was expected.
    """
    check_heads(q, k, v, chunk_query)
    check_numbers(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    check_positions(q, k, chunk_size, document_starts, query_starts, support)
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        raise ValueError("backend='triton' of dash_attention is not built yet: use backend='reference'")
    if document_starts is None:
        document_starts = torch.zeros(1, k.shape[1], dtype=torch.int32, device=q.device)
    out, stats = dash_attention_reference(
        q,
        k,
        v,
        chunk_query,
        config=DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature),
        document_starts=document_starts,
        query_starts=query_starts,
        support=support,
    )
    return (out, stats) if return_stats else out
