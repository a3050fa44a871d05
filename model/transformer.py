"""The language model: Llama's architecture, with DashAttention or full attention in each block.

Parameter names are those of Hugging Face's Llama (Qwen3 with qk_norm), plus `self_attn.chunk_query` in Dash layers.
"""

from contextlib import nullcontext
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dash_train.kernels.dash import RoutingCounts, count_eligible, routing_totals
from dash_train.model.attention import Attention
from dash_train.model.cache import Cache
from dash_train.model.checkpointing import run_block
from dash_train.model.config import ActivationCheckpointing, ModelConfig
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.model.full_attention import BlockMask, document_mask
from dash_train.model.fused import RMSNorm, swiglu
from dash_train.model.layers import Embedding, Linear
from dash_train.model.loss import LanguageModelHead
from dash_train.model.offload import HostMemory, Offload
from dash_train.model.rotary import rotary_tables
from dash_train.model.rows import Rows, Watch

# Of a forward with labels, per layer: the fields of the kernels' RoutingTotals, in their order.
STATISTICS = ("active_chunks", "eligible_chunks", "union_chunks", "union_active", "residual")
MLP_TOKENS = 131072  # of a row that go through the MLP together


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, config.init_std)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, config.init_std)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.residual_scale = config.residual_scale
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: Rows,
    ) -> tuple[Tensor, RoutingCounts | None]:
        """The next hidden states `[batch, seq, hidden_size]`, and what a Dash layer routed (None with a cache)."""
        normed = self.input_layernorm(hidden)
        attended, counts = self.self_attn(normed, rotary, rows)
        hidden = torch.add(hidden, attended, alpha=self.residual_scale)
        del normed, attended  # as large as the row: gone before the MLP, unless autograd needs them
        return self._add_mlp_in_pieces(hidden), counts

    def _add_mlp_in_pieces(self, hidden: Tensor) -> Tensor:
        """A very long row goes through the MLP in pieces, computed again in the backward pass: its wide intermediates
        never stand in memory for the whole row.

        Under a checkpoint of the whole block the last piece is not computed a third time: recomputing the block ends
        where that piece's input is saved.
        """
        if hidden.shape[1] <= MLP_TOKENS:
            return self._add_mlp(hidden)
        run = partial(checkpoint, self._add_mlp, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([run(piece) for piece in hidden.split(MLP_TOKENS, dim=1)], dim=1)

    def _add_mlp(self, hidden: Tensor) -> Tensor:
        return torch.add(hidden, self.mlp(self.post_attention_layernorm(hidden)), alpha=self.residual_scale)


class Transformer(nn.Module):
    """Everything between token ids and the output projection."""

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: ActivationCheckpointing = "none",
        activation_offload: bool = False,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "vocab_size must be a number: the tokenizer's size, rounded up"
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.host_memory = HostMemory() if activation_offload else None
        self.has_full_layers = any(config.attention_type(layer) == "full" for layer in range(config.layers))
        self.router_warmup = False  # while it is set, Dash layers attend to everything and their routers learn
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        document_starts: Tensor | None = None,
        real: Tensor | None = None,
        cache: Cache | None = None,
        context: Context = WHOLE_ROWS,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[batch, seq, hidden_size]`, and the layers' STATISTICS `[layers, 5]` fp32.

        Where `context` shares the rows among ranks, those of this rank's tokens. With a cache, prompts are read piece
        by piece, and there are no statistics.
        """
        if cache is not None:
            pieces = [
                self._blocks(piece, positions, Rows(real=real_piece, cache=cache))[0]
                for piece, positions, real_piece in cache.pieces(tokens, real)
            ]
            return self.norm(torch.cat(pieces, 1)), None
        tokens, positions, rows = self.rows(tokens, document_starts, real, context, watch)
        hidden, counts = self._blocks(tokens, positions, rows)
        return self.norm(hidden), self._statistics(counts, rows)

    def rows(
        self,
        tokens: Tensor,
        document_starts: Tensor | None,
        real: Tensor | None,
        context: Context,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor, Rows]:
        """This rank's tokens of whole rows `[batch, seq]`, their positions in their documents `[1 or batch, seq]`, and
        what the blocks are told of them.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask: Tensor | BlockMask | None = None
        if document_starts is not None:
            if self.has_full_layers or self.router_warmup:
                mask = document_mask(document_starts, context.at_queries(positions)[0])
            positions = positions - document_starts
        else:  # made here once, not by each Dash layer
            document_starts = torch.zeros_like(tokens, dtype=torch.int32)
        if real is not None:
            real = context.at_queries(real)
        told = Rows(document_starts, real, mask, None, context, self.router_warmup, watch)
        return context.share(tokens), context.share(positions), told

    def _blocks(self, tokens: Tensor, positions: Tensor, rows: Rows) -> tuple[Tensor, list[RoutingCounts | None]]:
        """Hidden states after the last block, and what each block's router did."""
        rotary = self.rotary(positions, rows.document_starts, rows.cache)
        hidden = self.embed(tokens)
        offload = Offload(self.host_memory) if self.host_memory and torch.is_grad_enabled() else None
        counts = []
        for index, block in enumerate(self.layers):
            is_last = index == len(self.layers) - 1  # the backward pass begins with it: its input stays
            with offload.of(hidden) if offload and not is_last else nullcontext():
                hidden, layer_counts = run_block(block, (hidden, rotary, rows), self.activation_checkpointing)
            counts.append(layer_counts)
        return hidden, counts

    def embed(self, tokens: Tensor) -> Tensor:
        """What goes into the first block, `[batch, seq, hidden_size]`."""
        hidden = self.embed_tokens(tokens)
        return hidden if self.config.embedding_scale == 1 else hidden * self.config.embedding_scale

    def rotary(
        self, positions: Tensor, document_starts: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions `[1 or batch, seq]` of rows whose documents begin at `document_starts`, or of the
        piece of prompts or the step for which a cache has been made ready."""
        longest = None
        if self.config.rope_scaling is not None and self.config.rope_scaling.by_length:
            if cache is not None:
                longest = cache.lengths.max()
            elif document_starts is not None:
                index = torch.arange(document_starts.shape[1], device=document_starts.device)
                longest = (index - document_starts).max() + 1
        return rotary_tables(positions, self.config, longest)

    def _statistics(self, counts: list[RoutingCounts | None], rows: Rows) -> Tensor:
        """STATISTICS of each layer, `[layers, 5]` fp32: zeros but for Dash layers."""
        document_starts = rows.document_starts
        assert document_starts is not None
        nothing = torch.zeros(len(STATISTICS), device=document_starts.device)
        routed = [layer for layer in counts if layer is not None]
        if not routed:
            return nothing.expand(len(counts), -1)
        query_starts = rows.context.query_starts(document_starts.shape[1])
        eligible = count_eligible(document_starts, query_starts, routed[0].tokens, self.config.attention.chunk_size)
        totals = routing_totals(routed, eligible, rows.real, len(query_starts))
        by_layer = iter(torch.stack(totals, dim=1).float())
        return torch.stack([nothing if layer is None else next(by_layer) for layer in counts])


class Output(TypedDict, total=False):
    """What a forward returns: the logits without labels; with labels the rest, statistics only without a cache."""

    logits: Tensor
    loss: Tensor
    token_losses: Tensor
    active_chunks: Tensor
    eligible_chunks: Tensor
    union_chunks: Tensor
    union_active: Tensor
    residual: Tensor


class LanguageModel(nn.Module):
    """A causal language model.

    Args:
        config: its shape; `vocab_size` must be a number.
        activation_checkpointing: what each block keeps for the backward pass (see `checkpointing.py`).
        activation_offload: the kept inputs of the blocks wait in host memory; needs checkpointing.
        context: the ranks that share each row in a forward with labels; without labels every rank runs whole rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
        activation_offload: bool = False,
        context: Context = WHOLE_ROWS,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.model = Transformer(config, activation_checkpointing, activation_offload)
        self.lm_head = LanguageModelHead(config.hidden_size, self.model.embed_tokens.num_embeddings, config.init_std)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights again, as the constructor did; needed only after a construction on the meta device."""
        for module in self.modules():
            if isinstance(module, Linear | Embedding):
                module.reset_parameters(generator)
            elif isinstance(module, nn.RMSNorm | Attention):
                module.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_starts: Tensor | None = None,
        real: Tensor | None = None,
        cache: Cache | None = None,
        watch: Watch | None = None,
    ) -> Output:
        """Logits, or the loss and the attention's statistics.

        Args:
            tokens: `[batch, seq]` int64.
            labels: `[batch, seq]` int64, already shifted; -100 does not count.
            document_starts: `[batch, seq]` int32, where in the row each token's document begins, multiples of the
                chunk size; None when every row is one document, which full attention does faster.
            real: `[batch, seq]` bool, False for padding, which no statistic counts; None when there is none.
            cache: filled in place: by the whole prompts (`real` False on the right where a row is shorter) when it is
                empty, then by one token a row. It counts for itself what its layers attended to.
            watch: called with what goes into the attention of each Dash layer and comes out (see `rows.py`).

        Returns:
            Without labels, `logits` `[batch, seq, vocab]`, or `[batch, 1, vocab]`, those of each row's last real
            token, with a cache. With labels, `loss`, the sum of the counted tokens'
            cross-entropies (fp32, 0-dim); `token_losses` `[batch, seq]` fp32; and, without a cache, per layer
            `[layers]` fp32 `active_chunks`, `eligible_chunks`, `union_chunks`, `union_active`, `residual` (zeros for
            full attention).
            Where ranks share the rows, all ranks pass whole rows and each returns what its own tokens add to these
            sums (`token_losses` `[batch, seq / size]`: `context.share` of them all).
        """
        context = WHOLE_ROWS if labels is None or cache is not None else self.context
        hidden, statistics = self.model(tokens, document_starts, real, cache, context, watch)
        if self.config.logits_scale != 1:
            hidden = hidden * self.config.logits_scale
        if labels is None:
            return {"logits": self.lm_head(hidden if cache is None else cache.last(hidden))}
        loss, token_losses = self.lm_head(hidden, context.share(labels))
        if statistics is None:
            return {"loss": loss, "token_losses": token_losses}
        active, eligible, union, union_active, residual = statistics.unbind(1)
        return {
            "loss": loss,
            "token_losses": token_losses,
            "active_chunks": active,
            "eligible_chunks": eligible,
            "union_chunks": union,
            "union_active": union_active,
            "residual": residual,
        }
