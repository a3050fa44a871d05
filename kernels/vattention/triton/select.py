"""The indexer in Triton: scores of the chunks' summaries, then which chunks are certain, residual or dropped.

The same choice as population.split_population, and its definition is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import LOG2_E, power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.vattention.reference.population import (
    DROPPED_SHARE,
    NEEDLE_SAMPLE,
    NEEDLE_SHARE,
    VAttentionConfig,
)
from dash_train.kernels.vattention.triton.workspace import (
    ALL_TOKENS,
    CERTAIN_CHUNKS,
    DROPPED_CHUNKS,
    RESIDUAL_CHUNKS,
    RESIDUAL_TOKENS,
    SAMPLE,
    UNBOUNDED_CHUNKS,
    DecodeShape,
    Workspace,
)

SCORE_BLOCK = 64


def score_summaries(
    q: Tensor,
    summaries: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    lengths: Tensor,
    shape: DecodeShape,
    work: Workspace,
) -> None:
    """Writes work.scores, and work.upper if there are bounds, of the chunks that have begun."""
    k_min, k_max = bounds or (summaries, summaries)
    score_chunks_kernel[(triton.cdiv(shape.chunks, SCORE_BLOCK), shape.batch_heads)](
        q,
        summaries,
        k_min,
        k_max,
        lengths,
        work.scores,
        work.scores if work.upper is None else work.upper,
        *q.stride()[:2],
        *summaries.stride()[:3],
        *k_min.stride()[:3],
        *k_max.stride()[:3],
        shape.chunks,
        LOG2_E * shape.head_dim**-0.5,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=shape.block_dim,
        CHUNK=shape.chunk_size,
        BLOCK=SCORE_BLOCK,
        BOUNDED=work.upper is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
    )


@triton.jit
def score_chunks_kernel(
    q_ptr,
    summaries_ptr,
    k_min_ptr,
    k_max_ptr,
    lengths_ptr,
    scores_ptr,
    upper_ptr,
    q_batch_stride,
    q_head_stride,
    batch_stride,
    chunk_stride,
    head_stride,
    min_batch_stride,
    min_chunk_stride,
    min_head_stride,
    max_batch_stride,
    max_chunk_stride,
    max_head_stride,
    chunks,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program BLOCK chunks of a KV head: a q.ktilde_c and, with bounds, the largest a q.k of a key in c.

    That is a (max(q, 0).k_max + min(q, 0).k_min). In units of log 2: `scale` holds log2 e.
    """
    _, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    length = tl.load(lengths_ptr + batch)
    if tl.program_id(0) * BLOCK * CHUNK >= length:
        return

    # 1. The group's queries, [PADDED_GROUP, BLOCK_DIM].
    row = tl.arange(0, PADDED_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_head = row < GROUP
    is_complete = (chunk + 1) * CHUNK <= length
    head = kv_head * GROUP + row
    q_rows = q_ptr + batch * q_batch_stride + head * q_head_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=is_head[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    q = q.to(tl.float32)
    mask = is_complete[:, None] & (dim < HEAD_DIM)[None, :]
    rows = chunk.to(tl.int64)[:, None]

    # 2. The products with summaries and bounds, [BLOCK, BLOCK_DIM] each.
    keys = summaries_ptr + batch * batch_stride + kv_head * head_stride + rows * chunk_stride + dim[None, :]
    summaries = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
    scores = tl.dot(q, tl.trans(summaries), input_precision=PRECISION) * scale  # [PADDED_GROUP, BLOCK]
    out = (batch * KV_HEADS * GROUP + head)[:, None] * chunks + chunk[None, :]
    out_mask = is_head[:, None] & is_complete[None, :]
    tl.store(scores_ptr + out, scores, mask=out_mask)
    if BOUNDED:
        keys = k_max_ptr + batch * max_batch_stride + kv_head * max_head_stride + rows * max_chunk_stride + dim[None, :]
        k_max = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
        upper = tl.dot(tl.maximum(q, 0.0), tl.trans(k_max), input_precision=PRECISION)
        keys = k_min_ptr + batch * min_batch_stride + kv_head * min_head_stride + rows * min_chunk_stride + dim[None, :]
        k_min = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
        upper = tl.dot(tl.minimum(q, 0.0), tl.trans(k_min), upper, input_precision=PRECISION)
        tl.store(upper_ptr + out, upper * scale, mask=out_mask)


def select_chunks(
    lengths: Tensor, chunk_bias: Tensor | None, shape: DecodeShape, config: VAttentionConfig, work: Workspace
) -> None:
    """Writes work.order and work.counts, b being the base sample."""
    block = power_of_two(shape.chunks)
    select_kernel[(shape.batch_heads,)](
        work.scores,
        work.scores if work.upper is None else work.upper,
        lengths if chunk_bias is None else chunk_bias,
        lengths,
        work.order,
        work.counts,
        shape.chunks,
        config.sink,
        config.window,
        config.base_sample,
        config.heavy,
        config.max_sample,
        NEEDLE_SHARE * config.epsilon * config.chunk_size,
        DROPPED_SHARE * config.epsilon,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        CHUNK=shape.chunk_size,
        BLOCK=block,
        BIASED=chunk_bias is not None,
        BOUNDED=work.upper is not None,
        NEEDLE_SAMPLE=NEEDLE_SAMPLE,
        LOG2_E=LOG2_E,
        num_warps=4 if block <= 512 else 8 if block <= 4096 else 16,
    )


@triton.jit
def select_kernel(
    scores_ptr,
    upper_ptr,
    bias_ptr,
    lengths_ptr,
    order_ptr,
    counts_ptr,
    chunks,
    sink,
    window,
    base_sample,
    heavy,
    max_sample,
    limit,
    negligible,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEEDLE_SAMPLE: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """One program a KV head: all of its chunks at once, [BLOCK]; the definition is population.split_population."""
    batch_heads = tl.num_programs(0)
    batch_head, batch, _ = batch_and_head(tl.program_id(0), KV_HEADS)
    length = tl.load(lengths_ptr + batch)

    # 1. The population.
    chunk = tl.arange(0, BLOCK)
    population = chunk * CHUNK < length
    bias = tl.zeros([BLOCK], tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + batch_head * chunks + chunk, mask=population, other=float("-inf")) * LOG2_E
        population = bias > float("-inf")
    is_complete = population & ((chunk + 1) * CHUNK <= length)

    # 2. A chunk's rank: the logarithm of its share of the summaries' mass, in the head in which it is largest.
    rank = tl.full([BLOCK], float("-inf"), tl.float32)
    upper = tl.full([BLOCK], float("-inf"), tl.float32)
    for g in range(GROUP):
        place = (batch_head * GROUP + g) * chunks + chunk
        score = tl.load(scores_ptr + place, mask=is_complete, other=float("-inf")) + bias
        score = tl.where(is_complete, score, float("-inf"))
        highest = tl.max(score, 0)
        highest = tl.where(highest > float("-inf"), highest, 0.0)
        log_mass = highest + tl.log2(tl.maximum(tl.sum(tl.exp2(score - highest), 0), 1e-30))
        rank = tl.maximum(rank, score - log_mass)
        if BOUNDED:
            bound = tl.load(upper_ptr + place, mask=is_complete, other=float("-inf")) + bias
            upper = tl.maximum(upper, bound - log_mass)

    # 3. Certain: sink, window and the highest ranks. With bounds also the needles; what cannot matter is dropped.
    is_near = (chunk * CHUNK < sink) | (tl.minimum((chunk + 1) * CHUNK, length) > length - window)
    certain = population & is_near
    count = tl.sum(population.to(tl.int32), 0)
    wanted = tl.floor(count.to(tl.float32) * heavy + 0.5).to(tl.int32)
    certain = certain | top(rank, is_complete & ~certain, wanted)

    dropped = population & (chunk < 0)
    unbounded = population
    if BOUNDED:
        tokens = tl.maximum(count, 1).to(tl.float32) * CHUNK
        is_open = population & ~certain
        needles = is_open & is_complete & (upper > tl.log2(NEEDLE_SAMPLE * limit))
        left_open = tl.sum(is_open.to(tl.int32), 0).to(tl.float32)
        is_proof = tl.sum(needles.to(tl.int32), 0).to(tl.float32) <= max_sample * left_open
        certain = certain | tl.where(is_proof, needles, top(upper, needles, wanted))
        dropped = is_open & is_complete & (upper <= tl.log2(negligible / tokens))
        unbounded = needles | ~is_complete
    residual = population & ~certain & ~dropped

    # 4. The order: certain, residual, dropped chunks. Then how many they are.
    order_ptr += batch_head * chunks
    n_certain = tl.sum(certain.to(tl.int32), 0)
    n_residual = tl.sum(residual.to(tl.int32), 0)
    n_dropped = tl.sum(dropped.to(tl.int32), 0)
    tl.store(order_ptr + tl.cumsum(certain.to(tl.int32), 0) - 1, chunk, mask=certain)
    tl.store(order_ptr + n_certain + tl.cumsum(residual.to(tl.int32), 0) - 1, chunk, mask=residual)
    tl.store(order_ptr + n_certain + n_residual + tl.cumsum(dropped.to(tl.int32), 0) - 1, chunk, mask=dropped)

    tokens_of = tl.minimum(length - chunk * CHUNK, CHUNK)
    n_s = tl.sum(tl.where(residual, tokens_of, 0), 0)
    counts_ptr += batch_head
    tl.store(counts_ptr + CERTAIN_CHUNKS * batch_heads, n_certain)
    tl.store(counts_ptr + RESIDUAL_CHUNKS * batch_heads, n_residual)
    tl.store(counts_ptr + DROPPED_CHUNKS * batch_heads, n_dropped)
    tl.store(counts_ptr + RESIDUAL_TOKENS * batch_heads, n_s)
    tl.store(counts_ptr + ALL_TOKENS * batch_heads, tl.sum(tl.where(population, tokens_of, 0), 0))
    tl.store(counts_ptr + UNBOUNDED_CHUNKS * batch_heads, tl.sum((residual & unbounded).to(tl.int32), 0))
    least_sample = tl.minimum(n_s, base_sample)
    if BOUNDED:
        largest = tl.exp2(tl.max(tl.where(residual & is_complete, upper, float("-inf")), 0))
        needed = tl.ceil(n_residual.to(tl.float32) * CHUNK * largest / limit)
        needed = tl.minimum(needed, n_s.to(tl.float32)).to(tl.int32)
        least_sample = tl.where(is_proof, tl.maximum(least_sample, needed), least_sample)
    tl.store(counts_ptr + SAMPLE * batch_heads, least_sample)


@triton.jit
def top(rank, candidates, wanted):
    """The `wanted` candidates of the highest rank, of equal ones the first: their least rank is found bit by bit."""
    bits = rank.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)  # ordered as the ranks are
    key = tl.where(candidates, key, 0)
    wanted = tl.minimum(wanted, tl.sum(candidates.to(tl.int32), 0))
    least = wanted.to(tl.uint32) * 0
    for i in tl.static_range(32):
        higher = least | (2147483648 >> i)
        least = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= wanted, higher, least)
    above = candidates & (key > least)
    equal = candidates & (key == least)
    place = tl.cumsum(equal.to(tl.int32), 0)
    chosen = above | (equal & (place <= wanted - tl.sum(above.to(tl.int32), 0)))
    return chosen & (wanted > 0)
