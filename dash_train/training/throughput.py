"""Speed of a step: tokens a second, and the share of the device's peak reached, its FLOPs counted two ways."""

import resource
from typing import Any

import torch

from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import Recipe

# Dense bf16 matrix peak of a device, FLOP/s, by a part of its name (vendors' data sheets).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class Throughput:
    """Turns the tokens and seconds of a step into metrics."""

    def __init__(self, config: ModelConfig, recipe: Recipe, device: torch.device, ranks: int) -> None:
        self.config, self.seq, self.device, self.ranks = config, recipe.train.seq, device, ranks
        with torch.device("meta"):
            model = LanguageModel(config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.peak = peak_flops(device)

    def measure(self, tokens: int, seconds: float, routed_chunks: list[float | None]) -> dict[str, Any]:
        """Metrics of a step of `tokens` tokens over all ranks; `routed_chunks` is the mean |R| of each layer."""
        per_gpu = tokens / seconds / self.ranks
        return {
            "seconds": seconds,
            "tokens_per_second": per_gpu * self.ranks,
            "tokens_per_second_per_gpu": per_gpu,
            "mfu": self._share_of_peak(per_gpu * dense_flops_per_token(self.config, self.parameters, self.seq)),
            "attended_mfu": self._share_of_peak(
                per_gpu * attended_flops_per_token(self.config, self.parameters, self.seq, routed_chunks)
            ),
            "memory_gb": peak_memory_gb(self.device),
        }

    def _share_of_peak(self, flops: float) -> float | None:
        return flops / self.peak if self.peak else None


def dense_flops_per_token(config: ModelConfig, parameters: int, seq: int) -> float:
    """Forward and backward FLOPs of a token as if attention were dense: 6 N + 12 L H Q T (PaLM, appendix B).

    N leaves out an untied input embedding: looking a row up multiplies nothing.
    """
    return 6 * _matrix_parameters(config, parameters) + 12 * config.layers * config.heads * config.head_dim * seq


def attended_flops_per_token(
    config: ModelConfig, parameters: int, seq: int, routed_chunks: list[float | None]
) -> float:
    """Forward and backward FLOPs of a token from the keys it attends to.

    A Dash layer (a number of routed chunks) attends to them and half its own chunk, and scores half the row's
    summaries; a full layer (None) attends to half the row.
    """
    width, chunk_size = config.heads * config.head_dim, config.attention.chunk_size
    attention = 0.0
    for chunks in routed_chunks:
        keys = seq / 2 if chunks is None else chunk_size * (chunks + 0.5)
        summaries = 0.0 if chunks is None else seq / chunk_size / 2
        attention += 12 * width * keys + 6 * width * summaries
    return 6 * _matrix_parameters(config, parameters) + attention


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s, or None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in use so far: the GPU's as torch allocated it, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _matrix_parameters(config: ModelConfig, parameters: int) -> int:
    embedding = (config.vocab_size or 0) * config.hidden_size
    return parameters if config.tie_embeddings else parameters - embedding
