"""Stage 2 in Triton: attention of a tile over its own chunk and its list of routed chunks.

docs/internals.md has the words: tile, list, entry, segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import LOG2_E
from dash_train.kernels.common.rows import batch_and_head
from dash_train.kernels.common.softmax import add_weighted, softmax_step
from dash_train.kernels.dash.triton.routing import RoutingResults
from dash_train.kernels.dash.triton.tiles import Lists, Segment, Shape, strides_of

LN_2 = tl.constexpr(0.6931471805599453)


def attend_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    segment: Segment,
    lists: Lists,
    routing: RoutingResults,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of one segment's queries: writes its rows of `out` (like q, contiguous) and of `lse`.

    lse [batch, kv_heads, q_len, group] fp32: the natural logarithm of the softmax's denominator, log-prior included.
    """
    block_dim = shape.block_dim
    keys = min(shape.chunk_size, 16 if k.dtype == torch.float32 else 64)
    launch(
        attend_kernel,
        (shape.tiles(segment.tokens), shape.batch * shape.kv_heads),
        q,
        TensorDescriptor.from_tensor(k, [1, keys, 1, block_dim]),
        TensorDescriptor.from_tensor(v, [1, keys, 1, block_dim]),
        lists,
        routing.lengths,
        out,
        lse,
        strides_of(q),
        segment,
        LOG2_E * shape.head_dim**-0.5,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        TILE=shape.tile_tokens,
        LIST=shape.list_tokens,
        BLOCKS=shape.list_blocks,
        CHUNK=shape.chunk_size,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=block_dim,
        KEYS=keys,
        STAGES=4 if block_dim <= 128 else 2,  # blocks of keys and values in flight; on an SM two programs fit at 128
        num_warps=4,
    )


@triton.jit
def attend_kernel(
    q_ptr,
    k_tiles,
    v_tiles,
    lists,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    segment,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    LIST: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a tile, the longest histories first: o = softmax(a q.k_j + b_c(j)) V over its attended chunks.

    Logits are in units of log 2: `scale` and the log-priors hold log2 e.
    """
    ROWS: tl.constexpr = TILE * PADDED_GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head, batch, kv_head = batch_and_head(tl.program_id(1), KV_HEADS)

    # 1. The tile's queries.
    row = tl.arange(0, ROWS)
    token = tile * TILE + row // PADDED_GROUP  # within the segment
    head = row % PADDED_GROUP
    is_real = (token < segment.tokens) & (head < GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    q_rows = q_ptr + batch * q_strides.batch + (segment.row + token).to(tl.int64) * q_strides.token
    q_rows += (kv_head * GROUP + head) * q_strides.head
    q = tl.load(q_rows[:, None] + dim[None, :], mask=is_real[:, None] & in_dim[None, :], other=0.0)  # [ROWS, BLOCK_DIM]
    # Changes no value: what comes straight from a load wgmma reads from shared memory, whose bandwidth limits this
    # kernel; what was computed it reads from registers.
    q = tl.where(is_real[:, None], q, 0.0)

    # 2. The own chunk: causal, no prior. Every row sees its first key, so the maximum is finite from there on.
    own = (segment.position + tile * TILE) // CHUNK
    k_head = kv_head.to(tl.int32)
    k_batch = batch.to(tl.int32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    # Constant bounds: a loop of one round vanishes. Left in place it would make the compiler serialize the wgmma of the
    # loop below, which costs a fifth of this kernel's speed.
    for start in tl.range(0, CHUNK, KEYS, num_stages=1):
        key = own * CHUNK + start
        k = k_tiles.load([k_batch, key, k_head, 0]).reshape(KEYS, BLOCK_DIM)  # [KEYS, BLOCK_DIM]
        v = v_tiles.load([k_batch, key, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        is_seen = (key + tl.arange(0, KEYS))[None, :] <= (segment.position + token)[:, None]
        # [ROWS, KEYS]
        logits = tl.where(is_seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        highest, total, acc = softmax_step(highest, total, acc, logits, v)

    # 3. The routed chunks. softmax_step with the scale and the prior in one multiply-add.
    own_list = tile // (LIST // TILE)
    list_start = (batch_head * tl.cdiv(segment.tokens, LIST) + own_list) * segment.chunks
    chunks_ptr = lists.chunks + list_start
    prior_ptr = lists.prior + list_start * BLOCKS
    if BLOCKS > 1:
        prior_ptr += row // (TILE // BLOCKS * PADDED_GROUP)
    length = tl.load(lengths_ptr + batch_head * segment.row_lists + segment.list + own_list)
    STEPS: tl.constexpr = CHUNK // KEYS
    for step in tl.range(0, length * STEPS, num_stages=STAGES):
        entry = step // STEPS
        key = tl.load(chunks_ptr + entry) * CHUNK + step % STEPS * KEYS
        prior = tl.load(prior_ptr + entry * BLOCKS)  # one, or [ROWS]
        k = k_tiles.load([k_batch, key, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([k_batch, key, k_head, 0]).reshape(KEYS, BLOCK_DIM)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS], without scale and prior
        new_highest = tl.maximum(highest, tl.max(logits, 1) * scale + prior)
        weights = tl.exp2(logits * scale + (prior - new_highest)[:, None])
        total, acc = add_weighted(total, acc, weights, tl.exp2(highest - new_highest), v)
        highest = new_highest

    # 4. The output and the logarithm of its denominator.
    out_rows = (
        out_ptr
        + ((batch * segment.q_len + segment.row + token) * (KV_HEADS * GROUP) + kv_head * GROUP + head) * HEAD_DIM
    )
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows[:, None] + dim[None, :], out, mask=is_real[:, None] & in_dim[None, :])
    per_row = (batch_head * segment.q_len + segment.row + token) * GROUP + head
    tl.store(lse_ptr + per_row, (highest + tl.log2(total)) * LN_2, mask=is_real)
