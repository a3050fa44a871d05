"""Rotary position embedding (RoPE, arXiv 2104.09864) and its extensions to longer contexts.

Pairs are (i, i + head_dim / 2), the convention of Hugging Face's Llama, so that its checkpoints load as they are.
"""

import math

import torch
from torch import Tensor

from dash_train.model.config import ModelConfig, RopeScaling


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each pair, `[head_dim / 2]` fp32, and the factor on cos and sin (1 but for YaRN)."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, head_dim, theta, scaling), 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are interpolated, short ones left alone, those between blended by turns over the old context."""
    turns = scaling.original_seq * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, keep.clamp(0, 1))


def _yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2), with the ramp's ends rounded outwards."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(scaling.original_seq / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), head_dim - 1)
    pair = torch.arange(head_dim // 2, device=frequencies.device, dtype=torch.float32)
    interpolate = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling.factor, interpolate)


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 `[batch, seq, 1, head_dim / 2]`, of the positions `[batch, seq]` in their documents."""
    frequencies, factor = rotary_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, device=positions.device
    )
    angles = positions[..., None, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor
