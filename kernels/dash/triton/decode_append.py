"""All that a new token changes before attention, in one launch.

That is its key and value in the cache, the summary of the chunk that it completes, its query among the router's recent
ones and, where it begins a routing block, their mean.
"""

import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.triton.decode_routing import within_block
from dash_train.kernels.dash.triton.summaries import weighted_summary

QUERIES_IN_FLIGHT = tl.constexpr(8)  # whose loads wait for each other no longer


def append_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor | None,
    lengths: Tensor,
    chunk_query: Tensor | None,
    kept: tuple[Tensor, Tensor] | None,
    chunk_size: int,
    routing_block: int,
) -> None:
    """append_token for arguments already checked; `kept` are the state's recent_q and router_q, contiguous."""
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    block_dim = power_of_two(head_dim)
    recent_q, router_q = kept or (None, None)
    append_kernel[(batch * kv_heads,)](
        q,
        k,
        v,
        k_cache,
        v_cache,
        summaries,
        lengths,
        None if chunk_query is None else chunk_query.contiguous(),
        recent_q,
        router_q,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        head_dim**-0.5,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=power_of_two(group),
        CHUNK=chunk_size,
        ROUTING_BLOCK=routing_block,
        WINDOW=1 if recent_q is None else recent_q.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        num_warps=4 if chunk_size * block_dim <= 2**13 else 8,
    )


@triton.jit
def append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    summaries_ptr,
    lengths_ptr,
    w_ptr,
    recent_q_ptr,
    router_q_ptr,
    q_batch_stride,
    q_head_stride,
    k_batch_stride,
    k_head_stride,
    v_batch_stride,
    v_head_stride,
    k_cache_batch_stride,
    k_cache_token_stride,
    k_cache_head_stride,
    v_cache_batch_stride,
    v_cache_token_stride,
    v_cache_head_stride,
    summary_batch_stride,
    summary_chunk_stride,
    summary_head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program a KV head of a sequence, all of it at the token's place."""
    _, batch, kv_head = batch_and_head(tl.program_id(0), KV_HEADS)
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    if length == 0:
        return

    # 1. Key and value, [BLOCK_DIM] each.
    position = length - 1
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    k = tl.load(k_ptr + batch * k_batch_stride + kv_head * k_head_stride + dim, mask=in_dim)
    v = tl.load(v_ptr + batch * v_batch_stride + kv_head * v_head_stride + dim, mask=in_dim)
    k_rows = k_cache_ptr + batch * k_cache_batch_stride + kv_head * k_cache_head_stride
    v_rows = v_cache_ptr + batch * v_cache_batch_stride + kv_head * v_cache_head_stride
    tl.store(k_rows + position.to(tl.int64) * k_cache_token_stride + dim, k, mask=in_dim)
    tl.store(v_rows + position.to(tl.int64) * v_cache_token_stride + dim, v, mask=in_dim)

    # 2. The summary of the chunk that the token completes.
    if summaries_ptr is not None:
        place = batch * summary_batch_stride + kv_head * summary_head_stride
        w_head = w_ptr + kv_head * HEAD_DIM
        _add_summary(
            k_rows,
            k_cache_token_stride,
            length,
            w_head,
            summaries_ptr + place,
            summary_chunk_stride,
            scale,
            CHUNK,
            HEAD_DIM,
            BLOCK_DIM,
        )

    # 3. The group's queries and, where the token begins a block, their means with those before.
    if recent_q_ptr is not None:
        head = kv_head * GROUP + tl.arange(0, ROWS)
        is_q = (tl.arange(0, ROWS) < GROUP)[:, None] & in_dim[None, :]
        q_rows = q_ptr + batch * q_batch_stride + head * q_head_stride
        q = tl.load(q_rows[:, None] + dim[None, :], mask=is_q, other=0.0)  # [ROWS, BLOCK_DIM]
        token_size = KV_HEADS * GROUP * HEAD_DIM
        offset = head[:, None] * HEAD_DIM + dim[None, :]
        recent_rows = recent_q_ptr + batch * (WINDOW * token_size) + offset
        tl.store(recent_rows + position % WINDOW * token_size, q, mask=is_q)
        if not within_block(length, ROUTING_BLOCK):
            mean = _mean_of_recent(q, recent_rows, position, token_size, is_q, WINDOW)
            tl.store(router_q_ptr + batch * token_size + offset, mean, mask=is_q)


@triton.jit
def _add_summary(
    k_rows,
    token_stride,
    length,
    w_head,
    summary_rows,
    chunk_stride,
    scale,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The summary of the chunk that a KV head's newest key completed, if it did."""
    if length % CHUNK == 0:
        tl.debug_barrier()  # the key just stored is read again
        chunk = (length // CHUNK - 1).to(tl.int64)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        summary = weighted_summary(k_rows + token * token_stride, token < length, w_head, scale, HEAD_DIM, BLOCK_DIM)
        dim = tl.arange(0, BLOCK_DIM)
        tl.store(summary_rows + chunk * chunk_stride + dim, summary, mask=dim < HEAD_DIM)


@triton.jit
def _mean_of_recent(q, recent_rows, position, token_size, is_q, WINDOW: tl.constexpr):
    """The mean of the last WINDOW queries [ROWS, BLOCK_DIM], or of all, from the newest back as in router_queries.

    The newest is not read from where it was just stored.
    """
    total = q.to(tl.float32)
    count = tl.minimum(position + 1, WINDOW)
    for back in tl.range(1, count, loop_unroll_factor=QUERIES_IN_FLIGHT):
        before = recent_rows + (position - back) % WINDOW * token_size
        total += tl.load(before, mask=is_q, other=0.0).to(tl.float32)
    return (total / count).to(q.dtype)
