"""Rotary position embedding (RoPE, arXiv 2104.09864) and its extensions to longer contexts.

Pairs are (i, i + head_dim / 2), the convention of Hugging Face's Llama, so that its checkpoints load as they are.
"""

import math

import torch
from torch import Tensor

from dash_train.model.config import ModelConfig, RopeScaling


def rotary_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    longest: Tensor | int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """Radians per position of each pair, `[head_dim / 2]` fp32, and the factor on cos and sin.

    `longest` (0-dim) is the tokens of the longest row at hand, on which dynamic and LongRoPE scaling depend. The factor
    is 1 but for YaRN and LongRoPE.
    """
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    longest = torch.as_tensor(longest, device=device)
    if scaling.type == "dynamic":
        return _dynamic(pairs / head_dim, head_dim, theta, scaling, longest), 1.0
    if scaling.type == "longrope":
        return _longrope(frequencies, scaling, longest)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return _yarn(frequencies, head_dim, theta, scaling), factor


def _dynamic(exponents: Tensor, head_dim: int, theta: float, scaling: RopeScaling, longest: Tensor) -> Tensor:
    """Dynamic NTK scaling: a base that grows as rows become longer than those of the training."""
    stretch = (longest / scaling.original_seq).clamp(min=1)
    base = theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
    return 1.0 / base**exponents


def _longrope(frequencies: Tensor, scaling: RopeScaling, longest: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one of two lists of divisors; the factor is 1 where nothing is stretched."""
    short, long = (frequencies.new_tensor(divisors) for divisors in (scaling.short_factor, scaling.long_factor))
    factor = scaling.attention_factor or math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_seq))
    return frequencies / torch.where(longest > scaling.original_seq, long, short), factor


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are interpolated, short ones left alone, those between blended by turns over the old context."""
    turns = scaling.original_seq * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, keep.clamp(0, 1))


def _yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2), with the ramp's ends rounded outwards to whole pairs."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(scaling.original_seq / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pair = torch.arange(head_dim // 2, device=frequencies.device, dtype=torch.float32)
    interpolate = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling.factor, interpolate)


def rotary_tables(positions: Tensor, config: ModelConfig, longest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 `[batch, seq, 1, head_dim / 2]`, of the positions `[batch, seq]` in their documents.

    `longest` (0-dim): tokens of the longest row, where that is not what these positions reach.
    """
    scaling = config.rope_scaling
    if longest is None:
        longest = positions.max() + 1 if scaling is not None and scaling.by_length else positions.new_zeros(())
    frequencies, factor = rotary_frequencies(
        config.head_dim, config.rope_theta, scaling, longest, device=positions.device
    )
    angles = positions[..., None, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor
