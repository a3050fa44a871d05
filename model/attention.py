"""Self-attention of one block: projections, RoPE, then DashAttention or full causal attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dash_train.kernels.dash import (
    RoutingCounts,
    append_prompts,
    append_token,
    chunk_summaries,
    dash_attention,
    router_queries,
)
from dash_train.model.cache import Cache
from dash_train.model.checkpointing import attention_of_block
from dash_train.model.config import ModelConfig
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.model.decoding import attend_step
from dash_train.model.full_attention import full_attention
from dash_train.model.fused import RMSNorm, apply_rotary
from dash_train.model.layers import Linear
from dash_train.model.router_warmup import learn_routing
from dash_train.model.rows import Rows

# (router_q, k, chunk_query, document_starts, query_starts, real)
Look = Callable[[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...], Tensor | None], None]


class Attention(nn.Module):
    """Grouped-query attention of one layer, of the type that the configuration names for it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.attention_type = config.attention_type(layer)
        self.routing_scale = config.routing_scale(layer)
        self.routing_block, self.routing_window = config.routing_block(layer), config.routing_window(layer)
        self.router_error: Tensor | None = None  # 0-dim: how far routing was off in the last forward of a warm-up
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        std, residual_std = config.init_std, config.init_std / (2 * config.layers) ** 0.5
        self.q_proj = Linear(config.hidden_size, heads * head_dim, std, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * head_dim, std, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * head_dim, std, config.qkv_bias)
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
        rows: Rows,
        look: Look | None = None,
    ) -> tuple[Tensor, RoutingCounts | None]:
        """Attention output `[batch, seq, hidden_size]`, and what a Dash layer routed.

        Where rows are shared among ranks, `hidden` and the output are this rank's share. A cache is filled and counts
        for itself. A Dash layer calls `look` with all that decides its routing, and attends to nothing then.
        """
        cache, context = rows.cache, rows.context
        q, k, v = self.queries_keys_values(hidden, rotary, context)
        counts = None
        if cache is not None:
            out = self._step(q, k, v, cache) if cache.start is None else self._prompt(q, k, v, rows.real, cache)
        elif self.attention_type == "full":
            with attention_of_block():
                out = full_attention(q, k, v, rows.mask, context.query_starts(k.shape[1]))
        else:
            out, counts = self._dash_attention(q, k, v, rows, look)
        return self.o_proj(context.return_outputs(out).flatten(2)), counts

    def queries_keys_values(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], context: Context = WHOLE_ROWS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, seq, heads, head_dim]` and k, v `[batch, seq, kv_heads, head_dim]`; q and k rotated.

        Values come first: they travel between ranks while queries and keys are made.
        """
        sent_v = context.send_keys(self._heads(self.v_proj, hidden))
        q, k = self._heads(self.q_proj, hidden), self._heads(self.k_proj, hidden)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layer not in self.config.nope_layers:
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
        rows: Rows,
        look: Look | None,
    ) -> tuple[Tensor, RoutingCounts | None]:
        context, document_starts = rows.context, rows.document_starts
        chunk_query = context.own_heads(self.chunk_query)
        query_starts = context.query_starts(k.shape[1])
        backend = self.config.attention.backend

        def make_router_q(q: Tensor) -> Tensor:
            before = context.queries_before(q, self.routing_window - 1)
            sizes = self.routing_block, self.routing_window
            return router_queries(q, document_starts, query_starts, *sizes, before, backend)

        router_q = make_router_q(q)
        if look is not None:
            look(router_q, k, chunk_query, document_starts, query_starts, rows.real)
            return torch.zeros_like(q), None
        if rows.router_warmup:
            return self._warm_up(q, router_q, k, v, chunk_query, rows), None
        options = {
            "routing_block": self.routing_block,
            "document_starts": document_starts,
            "query_starts": query_starts,
            "backend": backend,
            **self.routing(),
        }
        with attention_of_block():
            out, stats = dash_attention(
                q, k, v, chunk_query, router_q=None if router_q is q else router_q, return_stats=True, **options
            )
        if rows.watch is not None:
            rows.watch(self.layer, (q, k, v, chunk_query, out), make_router_q, options)
        return out, stats.counts

    def _warm_up(self, q: Tensor, router_q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor, rows: Rows) -> Tensor:
        """Full attention, from which the router learns."""
        assert rows.document_starts is not None
        query_starts = rows.context.query_starts(k.shape[1])
        with attention_of_block():
            out = full_attention(q, k, v, rows.mask, query_starts)
        piece = q.shape[1] // len(query_starts)
        out, self.router_error = learn_routing(
            out,
            q,
            router_q,
            k,
            chunk_query,
            chunk_size=self.config.attention.chunk_size,
            routing_scale=self.routing_scale,
            routing_block=self.routing_block,
            positions=torch.cat([torch.arange(start, start + piece, device=q.device) for start in query_starts]),
            document_starts=rows.document_starts,
            real=rows.real,
        )
        return out

    def routing(self) -> dict[str, Any]:
        """How this layer routes: keywords of dash_attention and dash_decode alike."""
        attention = self.config.attention
        return {
            "chunk_size": attention.chunk_size,
            "routing_scale": self.routing_scale,
            "prior_normalizer": attention.prior_normalizer,
            "prior_temperature": attention.prior_temperature,
        }

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, cache: Cache) -> Tensor:
        """Attention of a piece of the prompts, after its keys and values have joined those of the pieces before."""
        assert cache.start is not None
        memory, start, stop = cache.layers[self.layer], cache.start, cache.start + q.shape[1]
        memory.keys[:, start:stop] = k
        memory.values[:, start:stop] = v
        keys, values = memory.keys[:, :stop], memory.values[:, :stop]
        if memory.summaries is not None:
            chunk_size = self.config.attention.chunk_size
            new = chunk_summaries(k, self._summary_query(k), chunk_size=chunk_size)
            memory.summaries[:, start // chunk_size : stop // chunk_size] = new
        memory.update_bounds(start, stop)
        if self.attention_type == "full" or cache.decoding.mode == "full":
            return full_attention(q, keys, values, None, (start,))
        router_q, routing = None, {**self.routing(), "routing_block": self.routing_block}
        if memory.routing is not None:
            assert memory.summaries is not None
            before = memory.routing.queries_before(start)
            router_q = router_queries(q, None, (start,), self.routing_block, self.routing_window, before)
            append_prompts(q, router_q, start, cache.lengths, memory.summaries, memory.routing, **routing)
        out, stats = dash_attention(
            q,
            keys,
            values,
            self.chunk_query,
            router_q=router_q,
            query_starts=(start,),
            backend=self.config.attention.backend,
            return_stats=True,
            **routing,
        )
        totals = stats.summary(real)
        cache.count_routing(self.layer, totals.active, totals.eligible)
        return out

    def _step(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
        """Attention of one token a row, `[batch, 1, heads, head_dim]`, after its key and value have been stored."""
        memory = cache.layers[self.layer]
        block = 1 if memory.routing is None else cache.decoding.routing_block(self.routing_block)
        append_token(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            memory.keys,
            memory.values,
            cache.lengths,
            summaries=memory.summaries,
            chunk_query=None if memory.summaries is None else self._summary_query(k),
            state=memory.routing,
            chunk_size=self.config.attention.chunk_size,
            routing_block=block,
        )
        memory.update_last_bounds(cache.lengths)
        routing = {**self.routing(), "routing_block": block} if self.attention_type == "dash" else None
        return attend_step(q[:, 0], cache, self.layer, routing)[:, None]

    def _summary_query(self, k: Tensor) -> Tensor:
        """The query of the chunk summaries, `[kv_heads, head_dim]`; full attention's are mean keys."""
        return self.chunk_query if self.attention_type == "dash" else k.new_zeros(k.shape[2:])
