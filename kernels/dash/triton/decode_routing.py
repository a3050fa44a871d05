"""Stage 1 of decoding in Triton: each KV head's list of the chunks to which its newest token attends.

There is one token a sequence, so scores are few and may go through memory: many programs compute them, reading the
summaries once; one program a head finds its threshold, with all of the head's scores in registers; and one program a KV
head writes the list.

All launches depend on the cache's capacity, never on the lengths, which only the device knows. A *sequence* is a row of
the batch; docs/internals.md has the other words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import MATRIX_ROWS, power_of_two
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import PBAR_MIN
from dash_train.kernels.dash.triton.routing import threshold

SUMMARIES_PER_PROGRAM = 64
SCORE_WARPS = 4
SCORES_PER_WARP = 2048  # of a threshold's program
LIST_WIDTH = 2048  # chunks that the program of a KV head looks at in one step
LIST_WARPS = 8


def route_newest(
    q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig, kept: ChunkLists | None = None
) -> ChunkLists:
    """What the newest tokens attend to.

    q [batch, heads, head_dim], the routers' queries, and summaries [batch, chunks, kv_heads, head_dim] fp32, last
    dimension contiguous.
    kept: the lists of the token before, changed in place: a sequence within a block keeps its list, and its own chunk
    grows. Without them every sequence routes.
    """
    return list_chunks(score_chunks(q, summaries, lengths, config), lengths, config, kept)


def score_chunks(q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig) -> Tensor:
    """z = s / 2 of every eligible chunk, [batch, kv_heads, group, chunks] fp32; of the others, and of sequences whose
    token does not begin a block, whatever was there.
    """
    batch, heads, head_dim = q.shape
    chunks, kv_heads = summaries.shape[1:3]
    group = heads // kv_heads
    z = torch.empty(batch, kv_heads, group, chunks, device=q.device)
    decode_score_kernel[(triton.cdiv(chunks, SUMMARIES_PER_PROGRAM), batch * kv_heads)](
        q,
        summaries,
        lengths,
        z,
        *q.stride()[:2],
        *summaries.stride()[:3],
        chunks,
        0.5 * config.score_scale(head_dim),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(MATRIX_ROWS, power_of_two(group)),
        CHUNK=config.chunk_size,
        ROUTING_BLOCK=config.routing_block,
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        BLOCK=SUMMARIES_PER_PROGRAM,
        num_warps=SCORE_WARPS,
    )
    return z


def list_chunks(z: Tensor, lengths: Tensor, config: DashConfig, kept: ChunkLists | None = None) -> ChunkLists:
    """The lists from the scores of score_chunks, written to `kept` if it is given."""
    batch, kv_heads, group, chunks = z.shape
    lists = kept or ChunkLists(
        chunks=torch.empty(batch, kv_heads, chunks, device=z.device, dtype=torch.int32),
        log_pbar=torch.empty(batch, kv_heads, chunks, device=z.device),
        keys=torch.empty(batch, kv_heads, device=z.device, dtype=torch.int32),
        normalizer=torch.empty(batch, kv_heads, device=z.device),
    )
    tau = torch.empty(batch, kv_heads, group, device=z.device)
    row_max = torch.empty_like(tau)
    width = power_of_two(chunks)
    decode_threshold_kernel[(tau.numel(),)](
        z,
        lengths,
        tau,
        row_max,
        chunks,
        HEADS=kv_heads * group,
        CHUNK=config.chunk_size,
        ROUTING_BLOCK=config.routing_block,
        WIDTH=width,
        num_warps=min(32, max(4, width // SCORES_PER_WARP)),
    )
    decode_list_kernel[(batch * kv_heads,)](
        z,
        tau,
        row_max,
        lengths,
        *lists,
        chunks,
        PBAR_MIN,
        KV_HEADS=kv_heads,
        GROUP=group,
        CHUNK=config.chunk_size,
        ROUTING_BLOCK=config.routing_block,
        WIDTH=min(width, LIST_WIDTH),
        NORMALIZER=config.prior_normalizer,
        num_warps=LIST_WARPS,
    )
    return lists


@triton.jit
def decode_score_kernel(
    q_ptr,
    summaries_ptr,
    lengths_ptr,
    z_ptr,
    q_batch_stride,
    q_head_stride,
    summary_batch_stride,
    summary_chunk_stride,
    summary_head_stride,
    chunks,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program BLOCK chunks of a KV head: z_c = scale q.ktilde_c of the whole group.

    A summary enters as a high and a low half, as in dash_attention.
    """
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)
    length = tl.load(lengths_ptr + batch)
    eligible = own_chunk(length, CHUNK)
    if (tl.program_id(0) * BLOCK >= eligible) | within_block(length, ROUTING_BLOCK):
        return

    # 1. Summaries and queries.
    head = tl.arange(0, ROWS)
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    is_head = head < GROUP
    is_eligible = chunk < eligible
    in_dim = (dim < HEAD_DIM)[None, :]
    summary_rows = summaries_ptr + batch * summary_batch_stride + kv_head * summary_head_stride
    summary_rows += chunk.to(tl.int64) * summary_chunk_stride
    summary = tl.load(summary_rows[:, None] + dim[None, :], mask=is_eligible[:, None] & in_dim, other=0.0)
    # [BLOCK, BLOCK_DIM] and [ROWS, BLOCK_DIM]
    q_rows = q_ptr + batch * q_batch_stride + (kv_head * GROUP + head) * q_head_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=is_head[:, None] & in_dim, other=0.0)

    # 2. Their products.
    high = summary.to(q.dtype)
    z = tl.dot(q, tl.trans(high), input_precision="ieee")  # [ROWS, BLOCK]
    if q.dtype != tl.float32:
        low = (summary - high.to(tl.float32)).to(q.dtype)
        z = tl.dot(q, tl.trans(low), z)
    z_rows = z_ptr + (batch_head * GROUP + head) * chunks
    tl.store(z_rows[:, None] + chunk[None, :], z * scale, mask=is_head[:, None] & is_eligible[None, :])


@triton.jit
def decode_threshold_kernel(
    z_ptr,
    lengths_ptr,
    tau_ptr,
    row_max_ptr,
    chunks,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a head: tau with sum_c max(z_c - row_max - tau, 0)^2 = 1, as in routing.py.

    Nothing is written where no chunk is eligible.
    """
    row = tl.program_id(0).to(tl.int64)  # batch * HEADS + head
    length = tl.load(lengths_ptr + row // HEADS)
    eligible = own_chunk(length, CHUNK)
    if (eligible == 0) | within_block(length, ROUTING_BLOCK):
        return
    lane = tl.arange(0, WIDTH)
    z = tl.load(z_ptr + row * chunks + lane, mask=lane < eligible, other=float("-inf"))[None, :]  # [1, WIDTH]
    row_max = tl.max(z, 1)
    highest = -1.0 / tl.sqrt(eligible.to(tl.float32))  # tau of equal scores
    tau, _ = threshold(z - row_max[:, None], tl.zeros([1], tl.float32) + tl.minimum(highest, -0.5), highest)
    place = row + tl.arange(0, 1)
    tl.store(tau_ptr + place, tau)
    tl.store(row_max_ptr + place, row_max)


@triton.jit
def decode_list_kernel(
    z_ptr,
    tau_ptr,
    row_max_ptr,
    lengths_ptr,
    chunks_ptr,
    log_pbar_ptr,
    keys_ptr,
    normalizer_ptr,
    chunks,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUTING_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """One program a KV head: pbar_c = mean of r_c^2 over the group, the chunks with pbar_c > 0, and the normaliser."""
    batch_head, batch, _ = batch_and_head(tl.program_id(0), KV_HEADS)
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    eligible = own_chunk(length, CHUNK)

    # 1. Within a block the list stays, and its own chunk grows.
    if within_block(length, ROUTING_BLOCK):
        listed = tl.cdiv(tl.load(keys_ptr + batch_head), CHUNK)
        tl.store(keys_ptr + batch_head, (listed - 1 - eligible) * CHUNK + length)
        return

    # 2. The routed chunks, WIDTH candidates at a time.
    lane = tl.arange(0, WIDTH)
    chunks_ptr += batch_head * chunks
    log_pbar_ptr += batch_head * chunks
    routed = 0
    log_sum = tl.zeros([WIDTH], tl.float32)
    log_max = tl.full([WIDTH], float("-inf"), tl.float32)
    for block in range(0, eligible, WIDTH):
        is_eligible = block + lane < eligible
        pbar = tl.zeros([WIDTH], tl.float32)
        for g in tl.static_range(GROUP):
            row = batch_head * GROUP + g
            z = tl.load(z_ptr + row * chunks + block + lane, mask=is_eligible, other=float("-inf"))
            root = tl.maximum(z - tl.load(row_max_ptr + row) - tl.load(tau_ptr + row), 0.0)
            pbar += root * root
        pbar /= GROUP  # [WIDTH]
        log_pbar = tl.log(tl.maximum(pbar, pbar_min))
        is_routed = pbar > 0
        place = routed + tl.cumsum(is_routed.to(tl.int32), 0) - 1
        tl.store(chunks_ptr + place, block + lane, mask=is_routed)
        tl.store(log_pbar_ptr + place, log_pbar, mask=is_routed)
        routed += tl.sum(is_routed.to(tl.int32), 0)
        log_sum += tl.where(is_routed, log_pbar, 0.0)
        log_max = tl.maximum(log_max, tl.where(is_routed, log_pbar, float("-inf")))

    # 3. The normaliser, and the own chunk, whose prior is 0.
    normalizer = 0.0
    if NORMALIZER == "geometric_mean":
        normalizer = tl.sum(log_sum, 0) / tl.maximum(routed, 1)
    elif NORMALIZER == "peak":
        normalizer = tl.where(routed > 0, tl.max(log_max, 0), 0.0)
    tl.store(normalizer_ptr + batch_head, normalizer)
    tl.store(chunks_ptr + routed, eligible)
    tl.store(log_pbar_ptr + routed, normalizer)
    tl.store(keys_ptr + batch_head, (routed - eligible) * CHUNK + length)


@triton.jit
def own_chunk(length, CHUNK: tl.constexpr):
    """The newest token's chunk, which is also the number of eligible ones; 0 for a sequence of length 0."""
    return (tl.maximum(length.to(tl.int32), 1) - 1) // CHUNK


@triton.jit
def within_block(length, ROUTING_BLOCK: tl.constexpr):
    """Whether the sequence keeps its list: its newest token does not begin a routing block."""
    return (tl.maximum(length.to(tl.int32), 1) - 1) % ROUTING_BLOCK != 0
