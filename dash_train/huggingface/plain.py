"""The blocks and the cache of a Dash model in plain torch, for the modelling file of an export (generated.py).

They have the names and the arguments of those with kernels (model/, cache.py), as far as modeling.py uses them. Each
token routes for itself, from the queries of its block; all that differs from the kernels is speed and memory.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dash_train.kernels.dash.reference.fused import attend_fast
from dash_train.kernels.dash.reference.stages import (
    eligible_chunks,
    group_heads,
    log_prior,
    route,
    summarize,
    whole_chunks,
)
from dash_train.model.layers import Linear

SCORES = 2**24  # of attention that are computed together, over all heads


def modeling_code() -> str:
    """The text of this file, which goes into every folder that is saved."""
    return Path(__file__).read_text()


class RopeScaling(SimpleNamespace):
    """How RoPE is stretched."""


class ModelConfig(SimpleNamespace):
    """The fields of a `DashConfig` under the names that the modules here have for them."""


def shape_of(config: Any) -> ModelConfig:
    """What a `DashConfig` says."""
    rope = config.rope_scaling
    if rope is not None:
        names = ("beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor")
        usual = dict(zip(names, (32.0, 1.0, True, 1.0, 4.0), strict=True))
        lists = dict.fromkeys(("attention_factor", "short_factor", "long_factor"))
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        rope = RopeScaling(**{**usual, **lists, **rope}, type=rope["rope_type"], original_seq=original)
        rope.by_length = rope.type in ("dynamic", "longrope")
    return ModelConfig(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        init_std=config.initializer_range,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        rope_theta=config.rope_theta,
        rope_scaling=rope,
        nope_layers=config.nope_layers,
        embedding_scale=config.embedding_scale,
        residual_scale=config.residual_scale,
        logits_scale=config.logits_scale,
        attention=config,
        attention_type=lambda layer: config.attention_types[layer],
    )


class BlockRows(NamedTuple):
    """What every block is told of rows `[batch, seq]` besides their hidden states."""

    document_starts: Tensor | None = None
    real: Tensor | None = None
    mask: Tensor | None = None
    cache: Any = None


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension."""


class LanguageModelHead(Linear):
    """Projection to the vocabulary."""


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, config.init_std)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, config.init_std)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: "BlockRows",
    ) -> tuple[Tensor, None]:
        """The next hidden states `[batch, seq, hidden_size]`; None stands where other blocks return statistics."""
        attended = self.self_attn(self.input_layernorm(hidden), rotary, rows)
        hidden = torch.add(hidden, attended, alpha=self.residual_scale)
        return torch.add(hidden, self.mlp(self.post_attention_layernorm(hidden)), alpha=self.residual_scale), None


class Attention(nn.Module):
    """Grouped-query attention of one layer: DashAttention, or full attention where the configuration says so."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.attention_type = config.attention_type(layer)
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
            routing = config.attention
            self.routing_scale = routing.routing_scale[layer]
            self.routing_block, self.routing_window = routing.routing_block[layer], routing.routing_window[layer]
            self.chunk_query = nn.Parameter(torch.zeros(kv_heads, head_dim))

    def reset_parameters(self) -> None:
        """The layer's own parameter: a chunk query of zero makes every summary the mean key."""
        if self.attention_type == "dash":
            nn.init.zeros_(self.chunk_query)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], rows: "BlockRows") -> Tensor:
        """Attention output `[batch, seq, hidden_size]`."""
        cache = rows.cache
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layer not in self.config.nope_layers:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        queries, starts = q, rows.document_starts
        if cache is None:
            positions = torch.arange(q.shape[1], device=q.device)[None]
        else:
            positions = cache.positions
            looks_back = self.attention_type == "dash" and max(self.routing_block, self.routing_window) > 1
            queries, k, v = cache.store(self.layer, q if looks_back else None, k, v)
            queries = q if queries is None else queries
        if starts is None:
            starts = torch.zeros_like(positions)
        if self.attention_type == "full":
            mask = rows.mask if cache is None else document_mask(starts, positions, k.shape[1])
            out = full_attention(q, k, v, mask)
        else:
            if max(self.routing_block, self.routing_window) > 1:
                queries = self._router_queries(queries, positions, starts)
            out = self._dash_attention(q, queries, k, v, positions, starts)
        return self.o_proj(out.flatten(2).to(hidden.dtype))

    def _router_queries(self, queries: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """Of each token, the mean of the last queries up to the first token of its routing block, like q.

        queries `[batch, keys, heads, head_dim]`, those of all positions so far.
        """
        first = positions - (positions - starts) % self.routing_block
        count = (first - starts + 1).clamp(max=self.routing_window)[..., None, None]
        rows = torch.arange(len(queries), device=queries.device)[:, None]
        total = torch.zeros((), device=queries.device)
        for back in range(self.routing_window):
            before = queries[rows, (first - back).clamp(min=0)].float()
            total = total + before.masked_fill(back >= count, 0)
        return (total / count).to(queries.dtype)

    def _dash_attention(
        self, q: Tensor, router_q: Tensor, k: Tensor, v: Tensor, positions: Tensor, starts: Tensor
    ) -> Tensor:
        """DashAttention of q `[batch, q_len, heads, head_dim]`, some rows at a time, recomputed in the backward."""
        kv_heads, chunk_size = k.shape[2], self.config.attention.chunk_size
        keys, values = whole_chunks(k, chunk_size), whole_chunks(v, chunk_size)
        summaries = summarize(keys, self.chunk_query, chunk_size)
        q, router_q = group_heads(q, kv_heads), group_heads(router_q, kv_heads)
        size = max(1, SCORES // (q.shape[0] * self.config.heads * keys.shape[2]))
        pieces = (*(x.split(size, 3) for x in (q, router_q)), *(x.split(size, 1) for x in (positions, starts)))
        outs = []
        for piece in zip(*pieces, strict=True):
            inputs = (*piece, keys, values, summaries)
            if torch.is_grad_enabled() and q.shape[3] > size:
                outs.append(checkpoint(self._attend, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                outs.append(self._attend(*inputs))
        return torch.cat(outs, 3).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _attend(
        self,
        q: Tensor,
        router_q: Tensor,
        positions: Tensor,
        starts: Tensor,
        keys: Tensor,
        values: Tensor,
        summaries: Tensor,
    ) -> Tensor:
        chunks, chunk_size = summaries.shape[2], self.config.attention.chunk_size
        eligible = eligible_chunks(positions, starts, chunks, chunk_size)
        prior, _ = log_prior(route(router_q, summaries, eligible, self.routing_scale), self.config.attention)
        own = torch.arange(chunks, device=q.device) == positions[:, None, :, None] // chunk_size
        return attend_fast(q, keys, values, prior.masked_fill(own, 0), positions, chunk_size)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q `[batch, q_len, heads, head_dim]`; a mask of None is causality."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def document_mask(starts: Tensor, positions: Tensor, keys: int | None = None) -> Tensor:
    """Who sees whom, bool `[batch, 1, q_len, keys]`: no later token, none before one's own document.

    starts `[batch, seq]`; positions `[q_len]` or, like starts, `[batch, q_len]`.
    """
    if positions.dim() == 1:
        starts, positions = starts[:, positions], positions[None]
    key = torch.arange(starts.shape[1] if keys is None else keys, device=starts.device)
    return ((key <= positions[..., None]) & (key >= starts[..., None]))[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x `[batch, seq, heads, head_dim]`, computed in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GenerationCache:
    """Keys and values of all layers, and queries of those whose routing looks back. Rows fill it from the left."""

    is_compileable = False
    is_linear = (False,)
    is_croppable = True

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.memory: list[list[Tensor | None]] = [[None, None, None] for _ in range(layers)]
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = self.lengths[:, None]  # of the tokens under way, in their rows
        self.filled = 0  # tokens a row, with padding

    @classmethod
    def begin(
        cls, config: Any, batch: int, capacity: int, _dtype: Any, device: torch.device, options: Any = None
    ) -> "GenerationCache":
        """An empty cache; options that only dash-train has are refused."""
        asked = getattr(options, "decode", None)
        if asked not in (None, "dash") or getattr(options, "routing_every", None) is not None:
            raise ValueError(
                f"decode {asked!r} and routing_every need the dash-train package; without it: decode 'dash'"
            )
        return cls(config.layers, batch, capacity, device)

    def get_seq_length(self, _layer: int = 0) -> int:
        """Tokens a row that have gone in, with padding."""
        return self.filled

    @property
    def longest(self) -> Tensor:
        """Tokens of the longest row, 0-dim."""
        return self.lengths.max()

    def pieces(self, hidden: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The tokens, their positions and `real`, once the cache has been made ready for them."""
        seq = hidden.shape[1]
        self.filled += seq
        self.capacity = max(self.capacity, self.filled)
        self.positions = self.lengths[:, None] + torch.arange(seq, device=hidden.device)
        self.lengths = self.lengths + (seq if real is None else real.sum(1))
        yield hidden, self.positions, real

    def store(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Put the tokens under way into a layer's memory; all that it holds of queries, keys and values."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        memory = self.memory[layer]
        for number, new in enumerate((q, k, v)):
            if new is None:
                continue
            held = memory[number]
            seen = 0 if held is None else held.shape[1]
            if seen < self.capacity:
                more = new.new_zeros(len(new), max(self.capacity - seen, seen), *new.shape[2:])
                held = more if held is None else torch.cat([held, more], 1)
            assert held is not None
            held[rows, self.positions] = new
            memory[number] = held
        return tuple(None if held is None else held[:, : self.filled] for held in memory)  # type: ignore[return-value]

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes a copy of `rows[i]` (int `[batch]`): beam search goes on with the best beams."""
        self.memory = [[None if held is None else held[rows] for held in memory] for memory in self.memory]
        self.lengths = self.lengths[rows]

    def activate_past_recording(self) -> None:
        """Nothing has to be kept for `crop` that is not."""

    def crop(self, tokens: int) -> None:
        """Take back the last so many tokens of every row; `tokens` is negative."""
        self.lengths = self.lengths + tokens
        self.filled += tokens
