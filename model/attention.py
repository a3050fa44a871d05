"""Self-attention of one block: projections, RoPE, then DashAttention or full causal attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dash_train.kernels.dash import (
    chunk_summaries,
    dash_attention,
    dash_decode,
    find_routing_scale,
    update_summaries,
)
from dash_train.model.cache import LayerCache
from dash_train.model.config import ModelConfig
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.model.full_attention import BlockMask, full_attention
from dash_train.model.fused import RMSNorm, apply_rotary
from dash_train.model.layers import Linear

# Of a forward with labels, per layer: the fields of the kernels' RoutingTotals, in their order.
STATISTICS = ("active_chunks", "eligible_chunks", "union_chunks", "union_active", "residual")


class Attention(nn.Module):
    """Grouped-query attention of one layer, of the type that the configuration names for it.

    While `calibrate_to` is a density, a forward of a Dash layer first sets `routing_scale` to the scale that gives it.
    While `watch` is set, it is called with (q, k, v, chunk_query, out) and the other arguments of each such forward.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention_type = config.attention_type(layer)
        self.routing_scale = config.routing_scale(layer)
        self.calibrate_to: float | None = None
        self.watch: Callable[[tuple[Tensor, ...], dict[str, Any]], None] | None = None
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        std, residual_std = config.init_std, config.init_std / (2 * config.layers) ** 0.5
        self.q_proj = Linear(config.hidden_size, heads * head_dim, std)
        self.k_proj = Linear(config.hidden_size, kv_heads * head_dim, std)
        self.v_proj = Linear(config.hidden_size, kv_heads * head_dim, std)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, residual_std)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=config.norm_eps)
        if self.attention_type == "dash":
            self.chunk_query = nn.Parameter(torch.empty(kv_heads, head_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The layer's own parameter: a chunk query of zero makes every summary the mean key."""
        if self.attention_type == "dash":
            nn.init.zeros_(self.chunk_query)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        document_starts: Tensor | None = None,
        real: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: LayerCache | None = None,
        context: Context = WHOLE_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """Attention output `[batch, seq, hidden_size]` and STATISTICS `[5]` fp32 (zeros but for Dash layers).

        `mask` is full attention's, None where causality is all; `real` only says which tokens the statistics count.
        Where `context` shares the rows among ranks, `hidden` and the output are this rank's share, `document_starts`
        those of whole rows, `mask` and `real` those of the queries that attend here.
        """
        q, k, v = self._queries_keys_values(hidden, rotary, context)
        statistics = hidden.new_zeros(len(STATISTICS), dtype=torch.float32)
        if cache is not None and hidden.shape[1] == 1:
            out = self._decode(q, k, v, mask, cache)
        elif self.attention_type == "full":
            out = full_attention(q, k, v, mask, context.query_starts(k.shape[1]))
        else:
            out, statistics = self._dash_attention(q, k, v, document_starts, real, context)
        if cache is not None and hidden.shape[1] > 1:
            self._store_prompt(k, v, cache)
        return self.o_proj(context.return_outputs(out).flatten(2)), statistics

    def _queries_keys_values(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, seq, heads, head_dim]` and k, v `[batch, seq, kv_heads, head_dim]`; q and k rotated.

        Values come first: they travel between ranks while queries and keys are made.
        """
        sent_v = context.send_keys(self._heads(self.v_proj, hidden))
        q, k = self._heads(self.q_proj, hidden), self._heads(self.k_proj, hidden)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, k, *rotary)
        sent_k, sent_q = context.send_keys(k), context.send_queries(q)
        return sent_q.receive(), sent_k.receive(), sent_v.receive()

    def _heads(self, projection: Linear, hidden: Tensor) -> Tensor:
        return projection(hidden).unflatten(-1, (-1, self.config.head_dim))

    def _dash_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        document_starts: Tensor | None,
        real: Tensor | None,
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        chunk_query = context.own_heads(self.chunk_query)
        query_starts = context.query_starts(k.shape[1])
        if self.calibrate_to is not None:
            self.routing_scale = find_routing_scale(
                q,
                k,
                chunk_query,
                self.calibrate_to,
                chunk_size=self.config.attention.chunk_size,
                document_starts=document_starts,
                query_starts=query_starts,
                real=real,
                add_up=context.add_up,
            )
        options = {
            "document_starts": document_starts,
            "query_starts": query_starts,
            "backend": self.config.attention.backend,
            **self._routing(),
        }
        out, stats = dash_attention(q, k, v, chunk_query, return_stats=True, **options)
        if self.watch is not None:
            self.watch((q, k, v, chunk_query, out), options)
        return out, torch.stack(stats.summary(real)).float()

    def _routing(self) -> dict[str, Any]:
        """How this layer routes: keywords of dash_attention and dash_decode alike."""
        attention = self.config.attention
        return {
            "chunk_size": attention.chunk_size,
            "routing_scale": self.routing_scale,
            "prior_normalizer": attention.prior_normalizer,
            "prior_temperature": attention.prior_temperature,
        }

    def _store_prompt(self, k: Tensor, v: Tensor, cache: LayerCache) -> None:
        cache.keys[:, : k.shape[1]] = k
        cache.values[:, : v.shape[1]] = v
        if cache.summaries is not None:
            summaries = chunk_summaries(k, self.chunk_query, chunk_size=self.config.attention.chunk_size)
            cache.summaries[:, : summaries.shape[1]] = summaries

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, cache: LayerCache) -> Tensor:
        """Store the new token's key and value, `[batch, 1, kv_heads, head_dim]`, and attend to all of the row."""
        row = torch.arange(len(k), device=k.device)
        cache.keys[row, cache.lengths - 1] = k[:, 0]
        cache.values[row, cache.lengths - 1] = v[:, 0]
        if cache.summaries is None:
            return full_attention(q, cache.keys, cache.values, mask)
        chunk_size = self.config.attention.chunk_size
        update_summaries(cache.keys, cache.summaries, cache.lengths, self.chunk_query, chunk_size=chunk_size)
        out = dash_decode(q[:, 0], cache.keys, cache.values, cache.summaries, cache.lengths, **self._routing())
        return out[:, None]
