"""Self-attention of one block: projections, RoPE, then DashAttention or full causal attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dash_train.model.config import ModelConfig
from dash_train.model.layers import Linear
from dash_train.model.rotary import apply_rotary

STATISTICS = ("active_chunks", "eligible_chunks", "union_chunks", "union_active", "residual")


class Attention(nn.Module):
    """Grouped-query attention of one layer, of the type that the configuration names for it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention_type = config.attention_type(layer)
        self.routing_scale = config.routing_scale(layer)
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        std, residual_std = config.init_std, config.init_std / (2 * config.layers) ** 0.5
        self.q_proj = Linear(config.hidden_size, heads * head_dim, std)
        self.k_proj = Linear(config.hidden_size, kv_heads * head_dim, std)
        self.v_proj = Linear(config.hidden_size, kv_heads * head_dim, std)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, residual_std)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=config.norm_eps)
        if self.attention_type == "dash":
            self.chunk_query = nn.Parameter(torch.empty(kv_heads, head_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The layer's own parameter: a chunk query of zero makes every summary the mean key."""
        if self.attention_type == "dash":
            nn.init.zeros_(self.chunk_query)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], document_starts: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention output `[batch, seq, hidden_size]` and STATISTICS `[5]` fp32 (zeros for full attention)."""
        q, k, v = self._queries_keys_values(hidden, rotary)
        out = full_attention(q, k, v, mask)
        return self.o_proj(out.flatten(2)), hidden.new_zeros(len(STATISTICS), dtype=torch.float32)

    def _queries_keys_values(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, seq, heads, head_dim]` and k, v `[batch, seq, kv_heads, head_dim]`; q and k rotated."""
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q `[batch, seq, heads, head_dim]` over k, v; causal where the bool mask is None."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def document_mask(document_starts: Tensor) -> Tensor:
    """Who sees whom in packed rows, bool `[batch, 1, seq, seq]`: no later token, none before one's own document."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    return ((index <= index[:, None]) & (index >= document_starts[..., None]))[:, None]
