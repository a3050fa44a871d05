"""Stage 2 of decoding in Triton: attention of each KV head's group over its list of chunks, by evenly loaded programs.

The lists of all KV heads of all sequences, one behind the other, are one row of key blocks. It is cut into as many
equal parts as there are programs, so lists of very different lengths load the device evenly. A program's part may
begin and end within a list and cover several; for each list that it touches it leaves a partial result. Parts and lists
are both in order, so program + list is a different number for every such pair: the place of its partial result. A
*sequence* is a row of the batch; docs/internals.md has the other words.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.numbers import LOG2_E, MATRIX_ROWS, power_of_two
from dash_train.kernels.common.softmax import softmax_step
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import temperature

PROGRAMS_PER_SM = 3
PROGRAMS_ON_CPU = 5
BLOCK_BYTES = 2**14  # of keys, and of values, in one step
STAGES = 5  # the loop has two levels of loads, chunk numbers and then keys: half of the other four are blocks in flight
WARPS = 4
MERGED_PARTS = 16  # partial results in one step of the merge


class Parts(NamedTuple):
    """Partial results: one of each pair of a program and a list that it touched, at program + list."""

    out: Tensor  # [places, group, head_dim] fp32, not yet divided by `total`
    highest: Tensor  # [places, group] fp32: the largest logit, in units of log 2
    total: Tensor  # [places, group] fp32: sum of 2^(logit - highest)


def attend_lists(q: Tensor, k_cache: Tensor, v_cache: Tensor, lists: ChunkLists, config: DashConfig) -> Tensor:
    """The output, like q [batch, heads, head_dim]; the last dimension of q and of the caches is contiguous."""
    return merge_parts(q, attend_parts(q, k_cache, v_cache, lists, config), lists)


def attend_parts(q: Tensor, k_cache: Tensor, v_cache: Tensor, lists: ChunkLists, config: DashConfig) -> Parts:
    """Every program's partial results."""
    heads, head_dim = q.shape[1:]
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    programs = _programs(q.device)
    places = programs + lists.keys.numel()
    parts = Parts(
        out=torch.empty(places, group, head_dim, device=q.device),
        highest=torch.empty(places, group, device=q.device),
        total=torch.empty(places, group, device=q.device),
    )
    attend_parts_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        *lists,
        *parts,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        lists.chunks.shape[2],
        lists.keys.numel(),
        LOG2_E * head_dim**-0.5,
        LOG2_E / temperature(config),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(MATRIX_ROWS, power_of_two(group)),
        CHUNK=config.chunk_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        KEYS=_keys_in_block(q),
        PADDED_LISTS=power_of_two(lists.keys.numel()),
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return parts


def merge_parts(q: Tensor, parts: Parts, lists: ChunkLists) -> Tensor:
    """The output, like q, from the partial results."""
    heads, head_dim = q.shape[1:]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    merge_parts_kernel[(lists.keys.numel(), heads // lists.keys.shape[1])](
        *parts,
        lists.keys,
        out,
        lists.keys.numel(),
        _programs(q.device),
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        KEYS=_keys_in_block(q),
        PADDED_LISTS=power_of_two(lists.keys.numel()),
        PARTS=MERGED_PARTS,
        num_warps=4,
    )
    return out


def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return PROGRAMS_ON_CPU
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _keys_in_block(q: Tensor) -> int:
    """Keys of one step, whatever the size of a chunk: what shared memory has room for several times."""
    return min(128, BLOCK_BYTES // (power_of_two(q.shape[-1]) * q.element_size()))


@triton.jit
def attend_parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chunks_ptr,
    log_pbar_ptr,
    keys_ptr,
    normalizer_ptr,
    part_ptr,
    highest_ptr,
    total_ptr,
    q_batch_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    capacity,
    lists,
    scale,
    prior_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_LISTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program an equal share of all key blocks: of each list in it, o and the softmax's denominator over its share.

    o = softmax(a q.k_j + b_c(j)) V. Logits are in units of log 2: both scales hold log2 e.
    """
    # 1. The share: blocks block .. part_end - 1 of all lists.
    index = tl.arange(0, PADDED_LISTS)
    list_ends = _list_ends(keys_ptr, lists, KEYS, PADDED_LISTS)
    blocks = tl.max(list_ends, 0).to(tl.int64)
    programs = tl.minimum(tl.num_programs(0), blocks)  # no part is empty
    program = tl.program_id(0)
    if program >= programs:
        return
    block = (program * blocks // programs).to(tl.int32)
    part_end = ((program + 1) * blocks // programs).to(tl.int32)
    row = tl.sum((list_ends <= block).to(tl.int32), 0)  # the list that the first block is in: a batch_head

    head = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    lane = tl.arange(0, KEYS)
    is_head = head < GROUP
    in_dim = (dim < HEAD_DIM)[None, :]
    while block < part_end:
        # 2. The share of list `row`.
        list_start = tl.max(tl.where(index < row, list_ends, 0), 0)
        stop = tl.minimum(part_end, tl.max(tl.where(index <= row, list_ends, 0), 0))
        batch = (row // KV_HEADS).to(tl.int64)
        kv_head = row % KV_HEADS
        keys = tl.load(keys_ptr + row)
        normalizer = tl.load(normalizer_ptr + row)
        list_chunks = chunks_ptr + row.to(tl.int64) * capacity
        list_log_pbar = log_pbar_ptr + row.to(tl.int64) * capacity
        k_head = k_ptr + batch * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
        v_head = v_ptr + batch * v_batch_stride + kv_head.to(tl.int64) * v_head_stride
        q_rows = q_ptr + batch * q_batch_stride + (kv_head * GROUP + head) * q_head_stride
        q = tl.load(q_rows[:, None] + dim[None, :], mask=is_head[:, None] & in_dim, other=0.0)  # [ROWS, BLOCK_DIM]

        # 3. Its keys, block by block.
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
        for step in tl.range(block - list_start, stop - list_start, num_stages=STAGES):
            # A block is a part of a chunk, or several chunks. The own chunk comes last, so what is unseen does too.
            key = step * KEYS + lane
            is_seen = key < keys
            chunk = tl.load(list_chunks + key // CHUNK, mask=is_seen, other=0)
            prior = tl.load(list_log_pbar + key // CHUNK, mask=is_seen, other=0.0)
            token = chunk * CHUNK + key % CHUNK
            row_offset = token.to(tl.int64)[:, None]
            # [KEYS, BLOCK_DIM]
            k = tl.load(k_head + row_offset * k_token_stride + dim[None, :], mask=is_seen[:, None] & in_dim, other=0.0)
            v = tl.load(v_head + row_offset * v_token_stride + dim[None, :], mask=is_seen[:, None] & in_dim, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS]
            logits += tl.where(is_seen, (prior - normalizer) * prior_scale, float("-inf"))[None, :]
            highest, total, acc = softmax_step(highest, total, acc, logits, v)

        # 4. The partial result.
        place = (program + row).to(tl.int64) * GROUP + head
        tl.store(part_ptr + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_head[:, None] & in_dim)
        tl.store(highest_ptr + place, highest, mask=is_head)
        tl.store(total_ptr + place, total, mask=is_head)
        block = stop
        row += 1


@triton.jit
def merge_parts_kernel(
    part_ptr,
    highest_ptr,
    total_ptr,
    keys_ptr,
    out_ptr,
    lists,
    programs,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_LISTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a query head: o = sum_p 2^(m_p - m) o_p / sum_p 2^(m_p - m) l_p over the parts p of its list.

    m_p, l_p and o_p are a part's largest logit, total and sum of values. Zeros for a sequence of length 0.
    """
    row = tl.program_id(0)
    group = tl.num_programs(1)
    index = tl.arange(0, PADDED_LISTS)
    list_ends = _list_ends(keys_ptr, lists, KEYS, PADDED_LISTS)
    blocks = tl.max(list_ends, 0).to(tl.int64)
    programs = tl.minimum(programs, blocks)
    list_start = tl.max(tl.where(index < row, list_ends, 0), 0)
    list_end = tl.max(tl.where(index <= row, list_ends, 0), 0)

    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    if list_end > list_start:
        # The programs of the list's first and last block: part p begins at block p * blocks // programs.
        first = (((list_start + 1) * programs - 1) // blocks).to(tl.int32)
        last = ((list_end * programs - 1) // blocks).to(tl.int32)
        for program in range(first, last + 1, PARTS):
            part = program + tl.arange(0, PARTS)
            is_part = part <= last
            place = (part + row).to(tl.int64) * group + tl.program_id(1)
            part_highest = tl.load(highest_ptr + place, mask=is_part, other=float("-inf"))
            part_total = tl.load(total_ptr + place, mask=is_part, other=0.0)
            mask = is_part[:, None] & in_dim[None, :]
            # [PARTS, BLOCK_DIM]
            out = tl.load(part_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
            new_highest = tl.maximum(highest, tl.max(part_highest, 0))
            share = tl.exp2(part_highest - new_highest)
            rescale = tl.exp2(highest - new_highest)
            total = total * rescale + tl.sum(part_total * share, 0)
            acc = acc * rescale + tl.sum(out * share[:, None], 0)
            highest = new_highest
        acc = acc / total
    out_row = (row.to(tl.int64) * group + tl.program_id(1)) * HEAD_DIM
    tl.store(out_ptr + out_row + dim, acc.to(out_ptr.dtype.element_ty), mask=in_dim)


@triton.jit
def _list_ends(keys_ptr, lists, KEYS: tl.constexpr, PADDED_LISTS: tl.constexpr):
    """Where each list ends in the row of all key blocks, [PADDED_LISTS]."""
    index = tl.arange(0, PADDED_LISTS)
    keys = tl.load(keys_ptr + index, mask=index < lists, other=0)
    return tl.cumsum(tl.cdiv(keys, KEYS), 0)
