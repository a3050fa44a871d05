"""Between the two reads: how many tokens are to be sampled. After them: the output and the report.

Both combine the splits of a head; one program does a head. The formulas are those of reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.vattention.reference.attention import VAttentionReport
from dash_train.kernels.vattention.reference.population import VAttentionConfig
from dash_train.kernels.vattention.triton.attend import reads_everything
from dash_train.kernels.vattention.triton.workspace import (
    ALL_TOKENS,
    CERTAIN_CHUNKS,
    DROPPED_CHUNKS,
    RESIDUAL_TOKENS,
    SAMPLE,
    SPLITS,
    UNBOUNDED_CHUNKS,
    DecodeShape,
    Workspace,
)

BLOCK = 32  # splits, or tokens of the base sample, at once


def find_budget(v_cache: Tensor, shape: DecodeShape, config: VAttentionConfig, work: Workspace) -> None:
    """Raises b in work.counts to the largest that a head of the group needs; writes centre, rms and squares."""
    budget_kernel[(shape.batch * shape.heads,)](
        v_cache,
        work.counts,
        work.tokens,
        work.base_logits,
        work.highest,
        work.total,
        work.acc,
        work.base_squares,
        work.base_top,
        work.centre,
        work.rms,
        *v_cache.stride()[:3],
        shape.chunks * shape.chunk_size,
        shape.base_sample,
        shape.batch_heads,
        config.quantile,
        config.epsilon,
        config.value_floor,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=shape.block_dim,
        CHUNK=shape.chunk_size,
        SPLITS=SPLITS,
        BASE_SPLITS=shape.base_splits,
        PADDED_SPLITS=power_of_two(SPLITS + shape.base_splits),
        BLOCK=BLOCK,
        VERIFY=config.verify,
        num_warps=4,
    )


@triton.jit
def budget_kernel(
    v_ptr,
    counts_ptr,
    tokens_ptr,
    base_logits_ptr,
    highest_ptr,
    total_ptr,
    acc_ptr,
    base_squares_ptr,
    base_top_ptr,
    centre_ptr,
    rms_ptr,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    capacity,
    base_sample,
    batch_heads,
    quantile,
    epsilon,
    value_floor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BASE_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    VERIFY: tl.constexpr,
):
    """One program a query head: b' = (z n_s sd / (epsilon D floor))^2, b = b' / (1 + b' / n_s).

    The largest b of the group stays. sd is that of w (v - o) over the base sample, or of w; floor is max(|o|,
    value_floor rms(v)), or 1.
    """
    ALL_SPLITS: tl.constexpr = 2 * SPLITS + BASE_SPLITS
    head = tl.program_id(0).to(tl.int64)
    batch_head = head // GROUP
    counts_ptr += batch_head
    n_s = tl.load(counts_ptr + RESIDUAL_TOKENS * batch_heads)
    m = tl.minimum(n_s, base_sample)
    stands_for = n_s.to(tl.float32) / tl.maximum(m, 1)

    # 1. D and o as the certain tokens and the base sample estimate them, in units of 2^top.
    split = tl.arange(0, PADDED_SPLITS)
    partial = head * ALL_SPLITS
    highest = tl.load(highest_ptr + partial + split, mask=split < SPLITS + BASE_SPLITS, other=float("-inf"))
    top = tl.max(highest, 0)
    mass, base_mass, out, base_out = combine(
        highest_ptr + partial,
        total_ptr + partial,
        acc_ptr + partial * HEAD_DIM,
        top,
        stands_for,
        stands_for,
        SPLITS + BASE_SPLITS,
        HEAD_DIM,
        BLOCK_DIM,
        SPLITS,
        BASE_SPLITS,
        BLOCK,
    )
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    centre = (out / mass).to(centre_ptr.dtype.element_ty)
    tl.store(centre_ptr + head * HEAD_DIM + dim, centre, mask=in_dim)
    centre = centre.to(tl.float32)

    # 2. The squares of the base sample about this o.
    tokens_ptr += batch_head * capacity + tl.load(counts_ptr + CERTAIN_CHUNKS * batch_heads) * CHUNK
    v_ptr += batch_head // KV_HEADS * v_batch_stride + batch_head % KV_HEADS * v_head_stride
    squares = tl.zeros([BLOCK], tl.float32)
    lengths = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, m, BLOCK, num_stages=3):
        turn = start + tl.arange(0, BLOCK)
        logits = tl.load(base_logits_ptr + head * base_sample + turn, mask=turn < m, other=float("-inf"))
        weights = tl.exp2(logits - top)
        if VERIFY == "denominator":
            squares += weights * weights
        else:
            token = tl.load(tokens_ptr + turn, mask=turn < m, other=0).to(tl.int64)
            mask = (turn < m)[:, None] & in_dim[None, :]
            # [BLOCK, BLOCK_DIM]
            v = tl.load(v_ptr + token[:, None] * v_token_stride + dim[None, :], mask=mask, other=0.0).to(tl.float32)
            lengths += tl.sum(v * v, 1)
            distance = tl.where(in_dim[None, :], v - centre[None, :], 0.0)
            squares += weights * weights * tl.sum(distance * distance, 1)

    # 3. The sample that the variance demands.
    squares = tl.sum(squares, 0)
    rms = tl.sqrt(tl.sum(lengths, 0) / tl.maximum(m, 1))
    tl.store(base_squares_ptr + head, squares)
    tl.store(base_top_ptr + head, top)
    tl.store(rms_ptr + head, rms)

    variance = sample_variance(squares, base_mass, base_out, centre, m, VERIFY) / (mass * mass)
    floor = output_floor(out / mass, rms, value_floor, VERIFY)
    population = tl.maximum(n_s, 1).to(tl.float32)
    spread = quantile * population
    inverse = (epsilon * floor) * (epsilon * floor) / (spread * spread * variance + 1e-30)
    b = tl.ceil(1 / (inverse + 1 / population)).to(tl.int32)
    tl.atomic_max(counts_ptr + SAMPLE * batch_heads, b)


def merge(q: Tensor, shape: DecodeShape, config: VAttentionConfig, work: Workspace) -> tuple[Tensor, VAttentionReport]:
    """The output, like q, and the report."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    size = (shape.batch, shape.kv_heads)
    report = VAttentionReport(
        tokens_read=torch.empty(size, dtype=torch.int32, device=q.device),
        density=torch.empty(size, device=q.device),
        half_width=torch.empty(shape.batch, shape.heads, device=q.device),
        dense_fallback=torch.empty(size, dtype=torch.bool, device=q.device),
        unbounded_chunks=torch.empty(size, dtype=torch.int32, device=q.device),
    )
    merge_splits_kernel[(shape.batch * shape.heads,)](
        work.counts,
        work.highest,
        work.total,
        work.acc,
        work.squares,
        work.base_squares,
        work.base_top,
        work.centre,
        work.rms,
        out,
        *report[:5],
        shape.base_sample,
        shape.batch_heads,
        config.max_sample,
        config.quantile,
        config.value_floor,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=shape.block_dim,
        CHUNK=shape.chunk_size,
        SPLITS=SPLITS,
        BASE_SPLITS=shape.base_splits,
        PADDED_SPLITS=power_of_two(shape.all_splits),
        BLOCK=BLOCK,
        VERIFY=config.verify,
        num_warps=4,
    )
    return out, report


@triton.jit
def merge_splits_kernel(
    counts_ptr,
    highest_ptr,
    total_ptr,
    acc_ptr,
    squares_ptr,
    base_squares_ptr,
    base_top_ptr,
    centre_ptr,
    rms_ptr,
    out_ptr,
    tokens_read_ptr,
    density_ptr,
    half_width_ptr,
    dense_ptr,
    unbounded_ptr,
    base_sample,
    batch_heads,
    max_sample,
    quantile,
    value_floor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BASE_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    VERIFY: tl.constexpr,
):
    """One program a query head: o = (sum over certain tokens of w v + n_s / b that over sampled ones) / D.

    D is the numerator with 1 in place of v. The half-width is z n_s sd sqrt((1 - b / n_s) / b) / (D floor).
    """
    ALL_SPLITS: tl.constexpr = 2 * SPLITS + BASE_SPLITS
    head = tl.program_id(0).to(tl.int64)
    batch_head = head // GROUP
    counts_ptr += batch_head
    n_s = tl.load(counts_ptr + RESIDUAL_TOKENS * batch_heads)
    b = tl.minimum(tl.load(counts_ptr + SAMPLE * batch_heads), n_s)
    everything = reads_everything(counts_ptr, batch_heads, base_sample, max_sample)

    # 1. The output.
    split = tl.arange(0, PADDED_SPLITS)
    partial = head * ALL_SPLITS
    is_base = (split >= SPLITS) & (split < SPLITS + BASE_SPLITS)
    in_use = (split < ALL_SPLITS) & ~(everything & is_base)
    highest = tl.load(highest_ptr + partial + split, mask=in_use, other=float("-inf"))
    top = tl.max(highest, 0)
    stands_for = n_s.to(tl.float32) / tl.maximum(b, 1)
    mass, sample_mass, out, sample_out = combine(
        highest_ptr + partial,
        total_ptr + partial,
        acc_ptr + partial * HEAD_DIM,
        top,
        tl.where(everything, 0.0, stands_for),
        tl.where(everything, 1.0, stands_for),
        ALL_SPLITS,
        HEAD_DIM,
        BLOCK_DIM,
        SPLITS,
        BASE_SPLITS,
        BLOCK,
    )
    out = out / mass
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=in_dim)

    # 2. The half-width, from the squares of all samples.
    extra = tl.arange(0, PADDED_SPLITS)
    highest = tl.load(highest_ptr + partial + SPLITS + BASE_SPLITS + extra, mask=extra < SPLITS, other=float("-inf"))
    was_read = highest > float("-inf")
    squares = tl.load(squares_ptr + head * SPLITS + extra, mask=was_read, other=0.0)
    squares = tl.sum(squares * tl.exp2(2 * (highest - top)), 0)
    base_unit = tl.exp2(2 * (tl.load(base_top_ptr + head) - top))
    squares += tl.load(base_squares_ptr + head) * base_unit
    centre = tl.load(centre_ptr + head * HEAD_DIM + dim, mask=in_dim, other=0.0).to(tl.float32)
    variance = sample_variance(squares, sample_mass, sample_out, centre, b, VERIFY) / (mass * mass)
    floor = output_floor(out, tl.load(rms_ptr + head), value_floor, VERIFY)
    size = n_s.to(tl.float32)
    unread = 1 - b.to(tl.float32) / tl.maximum(size, 1.0)
    width = quantile * size * tl.sqrt(variance / tl.maximum(b, 1) * unread) / floor
    tl.store(half_width_ptr + head, tl.where(everything | (b >= n_s), 0.0, width))

    # 3. Once a KV head, what was read.
    if head % GROUP == 0:
        tokens = tl.load(counts_ptr + ALL_TOKENS * batch_heads)
        dropped = tl.load(counts_ptr + DROPPED_CHUNKS * batch_heads) * CHUNK
        read = tl.where(everything, tokens, tokens - dropped - n_s + b)
        tl.store(tokens_read_ptr + batch_head, read)
        tl.store(density_ptr + batch_head, read.to(tl.float32) / tokens)
        tl.store(dense_ptr + batch_head, everything)
        unbounded = tl.load(counts_ptr + UNBOUNDED_CHUNKS * batch_heads)
        tl.store(unbounded_ptr + batch_head, tl.where(everything, 0, unbounded))


@triton.jit
def combine(
    highest_ptr,
    total_ptr,
    acc_ptr,
    top,
    base_factor,
    extra_factor,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BASE_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the first COUNT splits in units of 2^top: mass and values of all tokens, then of the sampled alone.

    Sampled tokens count base_factor or extra_factor times in the first two, once in the others.
    """
    dim = tl.arange(0, BLOCK_DIM)
    mass = tl.zeros([BLOCK], tl.float32)
    sample_mass = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK_DIM], tl.float32)
    sample_out = tl.zeros([BLOCK_DIM], tl.float32)
    for start in tl.static_range(0, COUNT, BLOCK):
        split = start + tl.arange(0, BLOCK)
        highest = tl.load(highest_ptr + split, mask=split < COUNT, other=float("-inf"))
        was_read = highest > float("-inf")
        unit = tl.where(was_read, tl.exp2(highest - top), 0.0)
        is_sampled = split >= SPLITS
        factor = tl.where(is_sampled, tl.where(split < SPLITS + BASE_SPLITS, base_factor, extra_factor), 1.0)
        total = tl.load(total_ptr + split, mask=was_read, other=0.0) * unit
        mask = was_read[:, None] & (dim < HEAD_DIM)[None, :]
        # [BLOCK, BLOCK_DIM]
        acc = tl.load(acc_ptr + split[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0) * unit[:, None]
        mass += total * factor
        sample_mass += tl.where(is_sampled, total, 0.0)
        out += tl.sum(acc * factor[:, None], 0)
        sample_out += tl.sum(tl.where(is_sampled[:, None], acc, 0.0), 0)
    return tl.sum(mass, 0), tl.sum(sample_mass, 0), out, sample_out


@triton.jit
def sample_variance(squares, mass, out, centre, count, VERIFY: tl.constexpr):
    """Sum over channels of var(w (v - centre)), or var(w), from sums over `count` sampled tokens."""
    if VERIFY == "denominator":
        sum_square = mass * mass
    else:
        difference = out - mass * centre
        sum_square = tl.sum(difference * difference, 0)
    variance = (squares - sum_square / tl.maximum(count, 1)) / tl.maximum(count - 1, 1)
    return tl.maximum(variance, 0.0)


@triton.jit
def output_floor(out, rms, value_floor, VERIFY: tl.constexpr):
    """max(|o|, c rms(v)), or 1 for the denominator."""
    floor = 1.0
    if VERIFY == "output":
        floor = tl.maximum(tl.sqrt(tl.sum(out * out, 0)), value_floor * rms)
    return floor
