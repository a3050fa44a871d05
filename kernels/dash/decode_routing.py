"""Stage 1 of decoding in Triton: each KV head's list of the chunks to which its newest token attends.

There is one token a sequence, so scores are few and may go through memory: many programs compute them, reading the
summaries once, and one program a KV head finds the thresholds of its group and writes the list. It reads its scores
several times, but they stay in its SM's first-level cache (4 heads of 128K tokens are 32 KB).

All launches depend on the cache's capacity, never on the lengths, which only the device knows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.dash.routing import MAX_STEPS, TOLERANCE, newton_step
from dash_train.kernels.dash.stages import PBAR_MIN, ChunkLists, DashConfig

MATRIX_ROWS = 16  # the least rows of a matrix product
SUMMARIES_PER_PROGRAM = 64
SCORE_WARPS = 4
LIST_TILE = 8192  # scores that the program of a KV head looks at in one step
LIST_WARPS = 16


def route_newest(q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig) -> ChunkLists:
    """q [batch, heads, head_dim] and summaries [batch, chunks, kv_heads, head_dim] fp32, last dimension contiguous."""
    return list_chunks(score_chunks(q, summaries, lengths, config), lengths, config)


def score_chunks(q: Tensor, summaries: Tensor, lengths: Tensor, config: DashConfig) -> Tensor:
    """z = s / 2 of every eligible chunk, [batch, kv_heads, group, chunks] fp32; of the others, whatever was there."""
    batch, heads, head_dim = q.shape
    chunks, kv_heads = summaries.shape[1:3]
    group = heads // kv_heads
    z = torch.empty(batch, kv_heads, group, chunks, device=q.device)
    score_kernel[(triton.cdiv(chunks, SUMMARIES_PER_PROGRAM), batch * kv_heads)](
        q,
        summaries,
        lengths,
        z,
        *q.stride()[:2],
        *summaries.stride()[:3],
        chunks,
        0.5 * config.routing_scale * head_dim**-0.5,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(MATRIX_ROWS, triton.next_power_of_2(group)),
        CHUNK=config.chunk_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK=SUMMARIES_PER_PROGRAM,
        num_warps=SCORE_WARPS,
    )
    return z


def list_chunks(z: Tensor, lengths: Tensor, config: DashConfig) -> ChunkLists:
    """The lists from the scores of score_chunks."""
    batch, kv_heads, group, chunks = z.shape
    lists = ChunkLists(
        chunks=torch.empty(batch, kv_heads, chunks, device=z.device, dtype=torch.int32),
        log_pbar=torch.empty(batch, kv_heads, chunks, device=z.device),
        keys=torch.empty(batch, kv_heads, device=z.device, dtype=torch.int32),
        normalizer=torch.empty(batch, kv_heads, device=z.device),
    )
    padded_group = triton.next_power_of_2(group)
    width = min(triton.next_power_of_2(chunks), max(128, LIST_TILE // padded_group))
    list_kernel[(batch * kv_heads,)](
        z,
        lengths,
        *lists,
        chunks,
        PBAR_MIN,
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        CHUNK=config.chunk_size,
        WIDTH=width,
        NORMALIZER=config.prior_normalizer,
        num_warps=min(LIST_WARPS, max(4, padded_group * width // 512)),
    )
    return lists


@triton.jit
def score_kernel(
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
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program BLOCK chunks of a KV head. A summary enters as a high and a low half, as in dash_attention."""
    sequence = tl.program_id(1).to(tl.int64)  # batch * KV_HEADS + KV head
    batch = sequence // KV_HEADS
    kv_head = sequence % KV_HEADS
    eligible = own_chunk(tl.load(lengths_ptr + batch), CHUNK)
    if tl.program_id(0) * BLOCK >= eligible:
        return

    head = tl.arange(0, ROWS)
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    is_head = head < GROUP
    is_eligible = chunk < eligible
    in_dim = (dim < HEAD_DIM)[None, :]
    summary_rows = summaries_ptr + batch * summary_batch_stride + kv_head * summary_head_stride
    summary_rows += chunk.to(tl.int64) * summary_chunk_stride
    summary = tl.load(summary_rows[:, None] + dim[None, :], mask=is_eligible[:, None] & in_dim, other=0.0)
    q_rows = q_ptr + batch * q_batch_stride + (kv_head * GROUP + head) * q_head_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=is_head[:, None] & in_dim, other=0.0)

    high = summary.to(q.dtype)
    z = tl.dot(q, tl.trans(high), input_precision="ieee")
    if q.dtype != tl.float32:
        low = (summary - high.to(tl.float32)).to(q.dtype)
        z = tl.dot(q, tl.trans(low), z)
    z_rows = z_ptr + (sequence * GROUP + head) * chunks
    tl.store(z_rows[:, None] + chunk[None, :], z * scale, mask=is_head[:, None] & is_eligible[None, :])


@triton.jit
def list_kernel(
    z_ptr,
    lengths_ptr,
    chunks_ptr,
    log_pbar_ptr,
    keys_ptr,
    normalizer_ptr,
    chunks,
    pbar_min,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """One program a KV head. The thresholds are found as in routing.py."""
    sequence = tl.program_id(0).to(tl.int64)  # batch * KV_HEADS + KV head
    length = tl.load(lengths_ptr + sequence // KV_HEADS).to(tl.int32)
    eligible = own_chunk(length, CHUNK)
    head = tl.arange(0, PADDED_GROUP)
    lane = tl.arange(0, WIDTH)
    z_rows = z_ptr + (sequence * GROUP + tl.minimum(head, GROUP - 1)) * chunks  # rows without a head repeat the last
    z_rows = z_rows[:, None] + lane[None, :]

    highest = tl.full([PADDED_GROUP, WIDTH], float("-inf"), tl.float32)
    for block in range(0, eligible, WIDTH):
        is_eligible = (block + lane < eligible)[None, :]
        highest = tl.maximum(highest, tl.load(z_rows + block, mask=is_eligible, other=float("-inf")))
    row_max = tl.max(highest, 1)[:, None]
    largest_tau = -1.0 / tl.sqrt(tl.maximum(eligible, 1).to(tl.float32))  # that of equal scores
    tau = tl.zeros([PADDED_GROUP], tl.float32) + tl.minimum(largest_tau, -0.5)
    residual = tl.where(eligible > 0, 1.0, 0.0)
    steps = 0
    while (residual > TOLERANCE) & (steps < MAX_STEPS):
        total = tl.zeros([PADDED_GROUP, WIDTH], tl.float32)
        square = tl.zeros([PADDED_GROUP, WIDTH], tl.float32)
        for block in range(0, eligible, WIDTH):
            is_eligible = (block + lane < eligible)[None, :]
            z = tl.load(z_rows + block, mask=is_eligible, other=float("-inf"))
            distance = tl.maximum(z - row_max - tau[:, None], 0.0)
            total += distance
            square += distance * distance
        norm = tl.sum(square, 1)
        residual = tl.max(tl.abs(norm - 1.0), 0)
        if residual > TOLERANCE:
            tau = newton_step(tau, tl.sum(total, 1), norm, largest_tau)
        steps += 1

    chunks_ptr += sequence * chunks
    log_pbar_ptr += sequence * chunks
    routed = 0
    log_sum = tl.zeros([WIDTH], tl.float32)
    log_max = tl.full([WIDTH], float("-inf"), tl.float32)
    for block in range(0, eligible, WIDTH):
        is_eligible = (block + lane < eligible)[None, :]
        z = tl.load(z_rows + block, mask=is_eligible, other=float("-inf"))
        root = tl.where((head < GROUP)[:, None], tl.maximum(z - row_max - tau[:, None], 0.0), 0.0)
        pbar = tl.sum(root * root, 0) / GROUP
        log_pbar = tl.log(tl.maximum(pbar, pbar_min))
        is_routed = pbar > 0
        place = routed + tl.cumsum(is_routed.to(tl.int32), 0) - 1
        tl.store(chunks_ptr + place, block + lane, mask=is_routed)
        tl.store(log_pbar_ptr + place, log_pbar, mask=is_routed)
        routed += tl.sum(is_routed.to(tl.int32), 0)
        log_sum += tl.where(is_routed, log_pbar, 0.0)
        log_max = tl.maximum(log_max, tl.where(is_routed, log_pbar, float("-inf")))

    normalizer = 0.0
    if NORMALIZER == "geometric_mean":
        normalizer = tl.sum(log_sum, 0) / tl.maximum(routed, 1)
    elif NORMALIZER == "peak":
        normalizer = tl.where(routed > 0, tl.max(log_max, 0), 0.0)
    tl.store(normalizer_ptr + sequence, normalizer)
    tl.store(chunks_ptr + routed, eligible)
    tl.store(log_pbar_ptr + routed, normalizer)
    tl.store(keys_ptr + sequence, (routed - eligible) * CHUNK + length)


@triton.jit
def own_chunk(length, CHUNK: tl.constexpr):
    """The newest token's chunk, which is also the number of eligible ones; 0 for a sequence of length 0."""
    return (tl.maximum(length.to(tl.int32), 1) - 1) // CHUNK
