"""What the Triton kernels of one decoding step pass on to each other, and how the step is split into programs.

A split is a share of a KV head's tokens that one program reads for all heads of the group: first those of the certain
chunks, then those of the base sample, then those of the rest of the sample. Sizes depend on shapes alone, so a CUDA
graph can be captured; a program whose share turns out empty says so and ends.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import MATRIX_ROWS, power_of_two
from dash_train.kernels.vattention.reference.population import VAttentionConfig

# Of the certain chunks, and again of what is sampled after the base sample. The same for every batch, so that a row's
# sums, and with them the rounding of its budget, do not depend on the other rows.
SPLITS = 16
BASE_TOKENS = 128  # of one base split

# Rows of Workspace.counts.
CERTAIN_CHUNKS = tl.constexpr(0)
RESIDUAL_CHUNKS = tl.constexpr(1)
DROPPED_CHUNKS = tl.constexpr(2)
RESIDUAL_TOKENS = tl.constexpr(3)  # n_s
ALL_TOKENS = tl.constexpr(4)  # of the population
UNBOUNDED_CHUNKS = tl.constexpr(5)  # of the residual, that could hide a needle
SAMPLE = tl.constexpr(6)  # b: the least of it, then raised by every head of the group
COUNTS = 7


class DecodeShape(NamedTuple):
    """Sizes shared by all kernels of one call."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    chunks: int  # of the capacity
    chunk_size: int
    base_sample: int

    @property
    def batch_heads(self) -> int:
        """KV heads of all rows."""
        return self.batch * self.kv_heads

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        """Rows of the matrix products: a group, filled up to what the tensor cores take."""
        return max(MATRIX_ROWS, power_of_two(self.group))

    @property
    def block_dim(self) -> int:
        return max(16, power_of_two(self.head_dim))

    @property
    def base_splits(self) -> int:
        return -(-self.base_sample // BASE_TOKENS)

    @property
    def all_splits(self) -> int:
        return 2 * SPLITS + self.base_splits


class Workspace(NamedTuple):
    """Everything is written before it is read. Heads, or KV heads, of all rows come first; logarithms are base 2."""

    scores: Tensor  # [batch * heads, chunks] fp32: logits of the summaries, without bias
    upper: Tensor | None  # [batch * heads, chunks] fp32: bounds of the chunks' logits, without bias
    order: Tensor  # [batch_heads, chunks] int32: certain chunks, then residual, then dropped ones, each ascending
    counts: Tensor  # [COUNTS, batch_heads] int32
    tokens: Tensor  # [batch_heads, chunks * chunk_size] int32: in the order they are read; -1: not written yet
    base_logits: Tensor  # [batch * heads, base_sample] fp32
    highest: Tensor  # [batch * heads, all_splits] fp32: largest logit, -inf: nothing was read
    total: Tensor  # [batch * heads, all_splits] fp32: sum of 2^(logit - highest)
    acc: Tensor  # [batch * heads, all_splits, head_dim] fp32: the same times v
    squares: Tensor  # [batch * heads, splits] fp32, of the rest of the sample: sum of (w |v - centre|)^2, or of w^2
    base_squares: Tensor  # [batch * heads] fp32: the same of the base sample, relative to base_top
    base_top: Tensor  # [batch * heads] fp32: the highest logit of the first run
    centre: Tensor  # [batch * heads, head_dim], v's type: the base sample's estimate of o
    rms: Tensor  # [batch * heads] fp32: of |v| in the base sample


def decode_shape(q: Tensor, k_cache: Tensor, config: VAttentionConfig) -> DecodeShape:
    """q [batch, heads, head_dim], k_cache [batch, capacity, kv_heads, head_dim]."""
    chunks = -(-k_cache.shape[1] // config.chunk_size)
    return DecodeShape(
        q.shape[0], q.shape[1], k_cache.shape[2], q.shape[2], chunks, config.chunk_size, config.base_sample
    )


def new_workspace(shape: DecodeShape, v_cache: Tensor, bounded: bool) -> Workspace:
    """Nothing in it is initialised."""
    heads, batch_heads = shape.batch * shape.heads, shape.batch_heads

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=v_cache.device)

    return Workspace(
        scores=empty(heads, shape.chunks),
        upper=empty(heads, shape.chunks) if bounded else None,
        order=empty(batch_heads, shape.chunks, dtype=torch.int32),
        counts=empty(COUNTS, batch_heads, dtype=torch.int32),
        tokens=empty(batch_heads, shape.chunks * shape.chunk_size, dtype=torch.int32),
        base_logits=empty(heads, shape.base_sample),
        highest=empty(heads, shape.all_splits),
        total=empty(heads, shape.all_splits),
        acc=empty(heads, shape.all_splits, shape.head_dim),
        squares=empty(heads, SPLITS),
        base_squares=empty(heads),
        base_top=empty(heads),
        centre=empty(heads, shape.head_dim, dtype=v_cache.dtype),
        rms=empty(heads),
    )
