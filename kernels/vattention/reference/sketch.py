"""A sketch of the keys, 2 bits a channel, and what it tells of every token's weight before the token is read.

A code is the place of a key's channel between the least and the largest of its chunk (the page bounds): one of four
cells of equal width. The true value lies somewhere in its cell. Taken as uniform there, channel by channel, it gives
the mean and the mean square of the weight exp(q.k) in closed form, as the moments of a sum of independent errors do.
Nothing but the size of the sample depends on whether that holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.common.numbers import compute_dtype

CELLS = 4  # of a channel: 2 bits
PACKED = 4  # codes in a byte
# Of the distance from the middle of the range to that of a cell: a channel's values crowd towards its mean, also inside
# a cell. Measured: the slope of the logits on the sketch's is 1 with it for normal keys in chunks of 64.
SHRINK = 0.93


class Prediction(NamedTuple):
    """What is known of the weight w = exp(logit) of each token, in logarithms [batch, kv_heads, group, tokens]."""

    mean: Tensor  # log E[w]
    root_mean_square: Tensor  # log E[w^2] / 2
    most: Tensor  # the largest logit that the bounds and the code allow


def make_sketch(k_cache: Tensor, bounds: tuple[Tensor, Tensor], chunk_size: int) -> Tensor:
    """The codes of all complete chunks, uint8 [batch, capacity, kv_heads, ceil(head_dim / 4)].

    Args:
        k_cache: [batch, capacity, kv_heads, head_dim], after RoPE.
        bounds: the least and the largest of each channel over every complete chunk's keys, each [batch, chunks,
            kv_heads, head_dim].

    With P = ceil(head_dim / 4), bits 2 i and 2 i + 1 of byte p hold the code of channel i P + p. The codes of an
    incomplete chunk say nothing.
    """
    k_min, step = _scale(bounds, k_cache.shape[1], chunk_size)
    code = ((k_cache.to(step.dtype) - k_min) / step.clamp(min=torch.finfo(step.dtype).tiny)).floor()
    code = code.nan_to_num(0).clamp(0, CELLS - 1).to(torch.uint8)
    bytes_a_key = -(-code.shape[-1] // PACKED)
    code = torch.nn.functional.pad(code, (0, PACKED * bytes_a_key - code.shape[-1])).unflatten(-1, (PACKED, -1))
    return sum((code[..., i, :] << 2 * i for i in range(PACKED)), torch.zeros_like(code[..., 0, :]))


def unpack(sketch: Tensor, head_dim: int) -> Tensor:
    """The codes, uint8 [batch, capacity, kv_heads, head_dim]."""
    return torch.cat([sketch >> 2 * i & CELLS - 1 for i in range(PACKED)], -1)[..., :head_dim]


def chunk_bounds(k_cache: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The least and the largest of each channel in every chunk, 2 of [batch, ceil(capacity / chunk_size), kv_heads,
    head_dim]; of the last, if the capacity ends within it, zero."""
    chunks = k_cache.shape[1] // chunk_size
    keys = k_cache[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    missing = (0, 0, 0, 0, 0, -(-k_cache.shape[1] // chunk_size) - chunks)
    low, high = (torch.nn.functional.pad(x, missing) for x in (keys.amin(2), keys.amax(2)))
    return low, high


def complete_bounds(bounds: tuple[Tensor, Tensor], lengths: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The bounds, with zeros for the chunks that a row's length does not fill."""
    chunk = torch.arange(bounds[0].shape[1], device=lengths.device)
    is_open = ((chunk + 1) * chunk_size > lengths[:, None])[..., None, None]
    return bounds[0].masked_fill(is_open, 0), bounds[1].masked_fill(is_open, 0)


def predict_weights(
    grouped_q: Tensor, sketch: Tensor, bounds: tuple[Tensor, Tensor], sketched: Tensor, chunk_size: int
) -> Prediction:
    """The weights' moments, without priors.

    Args:
        grouped_q: [batch, kv_heads, group, head_dim], divided by sqrt(head_dim).
        sketched: bool [batch, kv_heads, chunks]: the chunks whose codes are read; of others the bounds are all that
            is known, a single cell.
    """
    capacity, head_dim = sketch.shape[1], grouped_q.shape[-1]
    k_min, step = (x.to(grouped_q.dtype) for x in _scale(bounds, capacity, chunk_size))
    is_sketched = sketched.repeat_interleave(chunk_size, -1)[..., :capacity].transpose(1, 2)[..., None]
    place = SHRINK * (unpack(sketch, head_dim).to(step.dtype) - (CELLS - 1) / 2)
    middle = k_min + step * torch.where(is_sketched, place, 0) + step * CELLS / 2
    logit = torch.einsum("bhgd,bthd->bhgt", grouped_q, middle)

    chunk_step = (bounds[1] - bounds[0]).to(grouped_q.dtype) / CELLS
    width = torch.where(sketched.transpose(1, 2)[..., None], chunk_step, chunk_step * CELLS)
    reach = torch.einsum("bhgd,bchd->bhgcd", grouped_q.abs(), width) / 2  # of each channel's error in the logit
    moved = (1 - SHRINK) * (CELLS - 1)  # how far the outer cells' middles are shrunk, in half widths
    most = reach.sum(-1) * torch.where(sketched, 1 + moved, 1)[:, :, None]
    log_mean, log_square = _log_sinhc(reach).sum(-1), _log_sinhc(2 * reach).sum(-1)
    log_mean, log_square, most = (
        x.repeat_interleave(chunk_size, -1)[..., :capacity] for x in (log_mean, log_square, most)
    )
    return Prediction(logit + log_mean, logit + log_square / 2, logit + most)


def _scale(bounds: tuple[Tensor, Tensor], capacity: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """For every token the least of each channel and the width of a cell, in at least fp32."""
    k_min, k_max = (x.to(compute_dtype(x.dtype)) for x in bounds)
    low, step = (x.repeat_interleave(chunk_size, 1)[:, :capacity] for x in (k_min, (k_max - k_min) / CELLS))
    return low, step


def _log_sinhc(x: Tensor) -> Tensor:
    """log(sinh(x) / x) for x >= 0: the log of E[exp(e)] for an error e that is uniform between -x and x."""
    large = x.clamp(min=0.05)
    return torch.where(x < 0.05, x.square() / 6, large + torch.log(-torch.expm1(-2 * large)) - torch.log(2 * large))
