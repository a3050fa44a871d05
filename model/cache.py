"""The KV cache of a batch of rows, each with its own length."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from dash_train.model.config import ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """What one layer remembers. Rows fill it from the left; what stands at and after a row's length means nothing."""

    keys: Tensor  # [batch, capacity, kv_heads, head_dim], rotated
    values: Tensor  # [batch, capacity, kv_heads, head_dim]
    summaries: Tensor | None  # [batch, capacity / chunk_size, kv_heads, head_dim] fp32; Dash layers only
    lengths: Tensor  # [batch] int32, shared by all layers; the tokens of the forward in progress are included


@dataclass(frozen=True)
class Cache:
    """The caches of all layers, which `LanguageModel.forward` fills: with the prompts, then token by token."""

    layers: list[LayerCache]
    lengths: Tensor  # [batch] int32

    @classmethod
    def allocate(cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty cache for `capacity` tokens a row, rounded up to whole chunks."""
        chunks = -(-capacity // config.attention.chunk_size)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)

        def zeros(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, rows, config.kv_heads, config.head_dim, dtype=dtype, device=device)

        return cls(
            layers=[
                LayerCache(
                    keys=zeros(chunks * config.attention.chunk_size, dtype),
                    values=zeros(chunks * config.attention.chunk_size, dtype),
                    summaries=zeros(chunks, torch.float32) if config.attention_type(layer) == "dash" else None,
                    lengths=lengths,
                )
                for layer in range(config.layers)
            ],
            lengths=lengths,
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.layers[0].keys.shape[1]

    def advance(self, seq: int, real: Tensor | None) -> None:
        """Count the tokens of a forward of `seq` tokens a row: one more, or the real ones of the prompts."""
        if seq == 1:
            self.lengths.add_(1)
        elif real is None:
            self.lengths.fill_(seq)
        else:
            self.lengths.copy_(real.sum(1))
