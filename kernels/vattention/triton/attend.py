"""The kernel that reads the cache. It runs twice: for the certain chunks and the base sample, then for the rest.

A program first writes down its share's tokens in the order of reading, then reads their keys and values by that list.
The second run also sums the squares for the half-width; those of the base sample come from the budget, which is the
first to know the output that they are taken about.
"""

import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import LOG2_E
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.common.softmax import add_weighted
from dash_train.kernels.vattention.reference.population import VAttentionConfig
from dash_train.kernels.vattention.triton.permutation import permute, sample_key
from dash_train.kernels.vattention.triton.workspace import (
    BASE_TOKENS,
    CERTAIN_CHUNKS,
    DROPPED_CHUNKS,
    RESIDUAL_CHUNKS,
    RESIDUAL_TOKENS,
    SAMPLE,
    SPLITS,
    DecodeShape,
    Workspace,
)

STAGES = 3  # of the loop that reads; 3 programs then share an SM and hide each other's loads. 5: each hides its own
LIST_BLOCK = 256  # tokens whose place in the permutation is computed at once


def attend_sample(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    chunk_bias: Tensor | None,
    seed: Tensor,
    shape: DecodeShape,
    config: VAttentionConfig,
    work: Workspace,
    *,
    extra: bool,
) -> None:
    """Writes the splits of the certain chunks and of the base sample, or with `extra` those of all that is left."""
    row_bytes = shape.block_dim * k_cache.element_size()
    tile = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    attend_sample_kernel[(SPLITS if extra else SPLITS + shape.base_splits, shape.batch_heads)](
        q,
        k_cache,
        v_cache,
        lengths,
        lengths if chunk_bias is None else chunk_bias,
        seed,
        work.order,
        work.counts,
        work.tokens,
        work.base_logits,
        work.highest,
        work.total,
        work.acc,
        work.squares,
        work.centre,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        shape.chunks,
        shape.base_sample,
        config.max_sample,
        LOG2_E * shape.head_dim**-0.5,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=shape.block_dim,
        CHUNK=shape.chunk_size,
        TILE=tile,
        LIST_BLOCK=LIST_BLOCK,
        SPLITS=SPLITS,
        BASE_SPLITS=shape.base_splits,
        BASE_TOKENS=BASE_TOKENS,
        BIASED=chunk_bias is not None,
        EXTRA=extra,
        SQUARES=config.verify if extra else "none",
        LOG2_E=LOG2_E,
        STAGES=STAGES,
        num_warps=4,
    )


@triton.jit
def attend_sample_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    bias_ptr,
    seed_ptr,
    order_ptr,
    counts_ptr,
    tokens_ptr,
    base_logits_ptr,
    highest_ptr,
    total_ptr,
    acc_ptr,
    squares_ptr,
    centre_ptr,
    q_batch_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    chunks,
    base_sample,
    max_sample,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    BASE_SPLITS: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    BIASED: tl.constexpr,
    EXTRA: tl.constexpr,
    SQUARES: tl.constexpr,
    LOG2_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a split of a KV head: sums over its tokens of w = 2^s and of w v, for all heads of the group.

    s = a q.k + the bias of the key's chunk, in units of log 2. With SQUARES also sum (w |v - centre|)^2, or sum w^2.
    """
    ALL_SPLITS: tl.constexpr = 2 * SPLITS + BASE_SPLITS
    split = tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    batch_heads = tl.num_programs(1)
    length = tl.load(lengths_ptr + batch)
    counts_ptr += batch_head
    # The list of tokens begins with those of the certain chunks; what is sampled stands behind them.
    sampled = tl.load(counts_ptr + CERTAIN_CHUNKS * batch_heads) * CHUNK
    n_s = tl.load(counts_ptr + RESIDUAL_TOKENS * batch_heads)

    # 1. The share: turns begin .. end - 1 of reading. `is_drawn`: they are turns of the permutation of the residual.
    if EXTRA:
        is_drawn = ~reads_everything(counts_ptr, batch_heads, base_sample, max_sample)
        chunks_left = tl.load(counts_ptr + RESIDUAL_CHUNKS * batch_heads) + tl.load(
            counts_ptr + DROPPED_CHUNKS * batch_heads
        )
        begin = tl.where(is_drawn, tl.minimum(n_s, base_sample), 0)
        end = tl.where(is_drawn, tl.minimum(tl.load(counts_ptr + SAMPLE * batch_heads), n_s), chunks_left * CHUNK)
        begin, end = share(begin, end, split, SPLITS, TILE)
        out_split = SPLITS + BASE_SPLITS + split
    else:
        is_drawn = split >= SPLITS
        first, last = share(0, sampled, split, SPLITS, TILE)
        base_first = (split - SPLITS) * BASE_TOKENS
        begin = tl.where(is_drawn, base_first, first)
        end = tl.where(is_drawn, tl.minimum(tl.minimum(base_first + BASE_TOKENS, base_sample), n_s), last)
        sampled = tl.where(is_drawn, sampled, 0)
        out_split = split

    row = tl.arange(0, PADDED_GROUP)
    is_head = row < GROUP
    head = batch_head * GROUP + row
    partial = head * ALL_SPLITS + out_split
    if begin >= end:
        tl.store(highest_ptr + partial, tl.full([PADDED_GROUP], float("-inf"), tl.float32), mask=is_head)
        return

    # 2. Its tokens, written down in the order of reading.
    order_ptr += batch_head * chunks + sampled // CHUNK
    tokens_ptr += batch_head * chunks * CHUNK + sampled
    key = sample_key(tl.load(seed_ptr + batch), kv_head)
    for block in range(begin, end, LIST_BLOCK):
        turn = block + tl.arange(0, LIST_BLOCK)
        place = turn
        if is_drawn:
            place = permute(tl.minimum(turn, n_s - 1), n_s, key)
        token = tl.load(order_ptr + place // CHUNK, mask=turn < end, other=0) * CHUNK + place % CHUNK
        tl.store(tokens_ptr + turn, tl.where(token < length, token, -1), mask=turn < end)
    tl.debug_barrier()

    # 3. The group's queries and, for the squares, the output about which they are taken: [PADDED_GROUP, BLOCK_DIM].
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = (dim < HEAD_DIM)[None, :]
    q_rows = q_ptr + batch * q_batch_stride + (kv_head * GROUP + row) * q_head_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=is_head[:, None] & in_dim, other=0.0)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    bias_ptr += batch_head * chunks
    if SQUARES == "output":
        centre_rows = centre_ptr + head[:, None] * HEAD_DIM + dim[None, :]
        centre = tl.load(centre_rows, mask=is_head[:, None] & in_dim, other=0.0)
        centre_square = tl.sum(centre.to(tl.float32) * centre.to(tl.float32), 1)

    # 4. Tile by tile.
    highest = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    squares = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, BLOCK_DIM], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        turn = start + tl.arange(0, TILE)
        token = tl.load(tokens_ptr + turn, mask=turn < end, other=-1)
        is_token = token >= 0
        mask = is_token[:, None] & in_dim
        place = token.to(tl.int64)[:, None]
        k = tl.load(k_ptr + place * k_token_stride + dim[None, :], mask=mask, other=0.0)  # [TILE, BLOCK_DIM]
        v = tl.load(v_ptr + place * v_token_stride + dim[None, :], mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [PADDED_GROUP, TILE]
        if BIASED:
            logits += (tl.load(bias_ptr + token // CHUNK, mask=is_token, other=0.0) * LOG2_E)[None, :]
        logits = tl.where(is_token[None, :], logits, float("-inf"))
        if not EXTRA:
            base = (head * base_sample)[:, None] + turn[None, :]
            tl.store(base_logits_ptr + base, logits, mask=is_head[:, None] & is_token[None, :] & is_drawn)

        new_highest = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(new_highest > float("-inf"), new_highest, 0.0)  # a tile may lie beyond the row's end
        weights = tl.exp2(logits - finite[:, None])
        rescale = tl.exp2(highest - finite)
        total, acc = add_weighted(total, acc, weights, rescale, v)
        if SQUARES == "denominator":
            squares = squares * rescale * rescale + tl.sum(weights * weights, 1)
        if SQUARES == "output":
            length_square = tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
            distance = tl.dot(centre, tl.trans(v), input_precision="ieee") * -2 + length_square[None, :]
            distance = tl.maximum(distance + centre_square[:, None], 0.0)
            squares = squares * rescale * rescale + tl.sum(weights * weights * distance, 1)
        highest = new_highest

    # 5. The split's sums.
    tl.store(highest_ptr + partial, highest, mask=is_head)
    tl.store(total_ptr + partial, total, mask=is_head)
    acc_rows = acc_ptr + partial[:, None] * HEAD_DIM + dim[None, :]
    tl.store(acc_rows, acc, mask=is_head[:, None] & in_dim)
    if EXTRA:
        tl.store(squares_ptr + head * SPLITS + split, squares, mask=is_head)


@triton.jit
def share(begin, end, split, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """The split-th of SPLITS parts of [begin, end), whole tiles but for the last."""
    part = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
    first = begin + split * part
    return first, tl.minimum(first + part, end)


@triton.jit
def reads_everything(counts_ptr, batch_heads, base_sample, max_sample):
    """Whether the sample of a KV head would be too large."""
    n_s = tl.load(counts_ptr + RESIDUAL_TOKENS * batch_heads)
    b = tl.maximum(tl.load(counts_ptr + SAMPLE * batch_heads), base_sample)
    return (n_s > 0) & (b.to(tl.float32) > max_sample * n_s.to(tl.float32))
