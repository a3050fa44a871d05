"""Sums over the micro-batches and ranks of a step: the loss, the tokens it counts, what the router did."""

import math

import torch
from torch import Tensor

from dash_train.distributed.world import max_over_ranks, sum_over_ranks

SUMS = ("active_chunks", "eligible_chunks", "union_chunks", "union_active")


class Totals:
    """Adds up what the model returns, on the device and in float64, and reads it on the host once."""

    def __init__(self, layers: int, kv_heads: int, device: torch.device) -> None:
        self.kv_heads = kv_heads
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # counted tokens, their bytes
        self.routing = torch.zeros(len(SUMS), layers, dtype=torch.float64, device=device)
        self.residual = torch.zeros(layers, dtype=torch.float64, device=device)

    def add(self, outputs: dict[str, Tensor], tokens: float, text_bytes: int = 0) -> None:
        """Add one micro-batch: the model's outputs, its counted tokens and the bytes of text they stand for."""
        self.loss += outputs["loss"].detach()
        self.counts += torch.tensor([tokens, text_bytes], dtype=torch.float64, device=self.counts.device)
        self.routing += torch.stack([outputs[name] for name in SUMS])
        self.residual = torch.maximum(self.residual, outputs["residual"])

    def reduce(self) -> None:
        """Sum (residual: maximise) over the ranks."""
        flat = sum_over_ranks(torch.cat([self.loss[None], self.counts, self.routing.flatten()]))
        self.loss, self.counts = flat[0], flat[1:3]
        self.routing = flat[3:].view_as(self.routing)
        self.residual = max_over_ranks(self.residual)

    @property
    def mean_loss(self) -> float:
        """Nats per counted token."""
        return (self.loss / self.counts[0].clamp(min=1)).item()

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of text: comparable between tokenizers."""
        return (self.loss / self.counts[1].clamp(min=1)).item() / math.log(2)

    def per_layer(self) -> dict[str, list[float | None]]:
        """What each layer's router did (None for layers that do not route): density, mean number of chunks routed to
        per token and KV head, union factor, worst entmax residual."""
        active, eligible, union, tiled_active = self.routing.tolist()
        tokens = max(self.counts[0].item() * self.kv_heads, 1)
        routes = [count > 0 for count in eligible]
        return {
            "density": [a / e if e else None for a, e in zip(active, eligible, strict=True)],
            "routed_chunks": [a / tokens if on else None for a, on in zip(active, routes, strict=True)],
            "union_factor": [u / a if a else None for u, a in zip(union, tiled_active, strict=True)],
            "residual": [r if on else None for r, on in zip(self.residual.tolist(), routes, strict=True)],
        }
