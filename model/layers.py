"""Linear and embedding layers that know how to draw their own initial weights.

Each layer is initialised in its own constructor, because DeepSpeed's `zero.Init` partitions its parameters as soon as
the constructor returns. `reset_parameters` draws again, for a model that was built on the meta device.
"""

import torch
from torch import nn


class Linear(nn.Linear):
    """A projection; weight ~ normal(0, std), bias (if any) 0."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        self.std = std  # before the parent's constructor, which calls reset_parameters
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Token embeddings; weight ~ normal(0, std)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.std, generator=generator)
