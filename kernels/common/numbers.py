"""Numbers and types that kernels share."""

import torch

LOG2_E = 1.4426950408889634  # kernels take exponentials to base 2: their logits are in units of log 2
MATRIX_ROWS = 16  # the least rows of a matrix product in Triton


def power_of_two(number: int) -> int:
    """The least that is at least `number`. (triton.next_power_of_2 costs the host ten times as much.)"""
    return 1 << (number - 1).bit_length()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute: float64 for float64, float32 for every other floating type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
