"""Decoding with full attention: the newest token of each sequence over all of its cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dash_train.kernels.common.backend import stride_obstacle, use_triton
from dash_train.kernels.common.checks import check_caches, check_shape
from dash_train.kernels.dash.checks import triton_obstacle
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig

CHUNK_SIZE = 64


@torch.no_grad()
def full_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    lists: ChunkLists | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of the newest token of each sequence to its first `lengths` keys.

    Args:
        q: [batch, heads, head_dim].
        k_cache, v_cache: [batch, capacity, kv_heads, head_dim]; what lies beyond `lengths` is not read.
        lengths: [batch] int32, from 1 to capacity.
        lists: those of list_all_chunks at these lengths, which the layers of a step can share; default: made here.
        backend: as in dash_decode; "triton" is its attention over the list of all chunks.

    Returns: [batch, heads, head_dim] in q's type.

    Raises: ValueError naming the argument, its shape and what was expected.
    """
    check_caches(q, k_cache, v_cache, lengths)
    batch, capacity, kv_heads, _ = k_cache.shape
    if lists is not None:
        check_shape("lists", lists.chunks, batch=batch, kv_heads=kv_heads, chunks=-(-capacity // CHUNK_SIZE))
    obstacle = triton_obstacle(q, CHUNK_SIZE) or stride_obstacle((q, k_cache, v_cache))
    if use_triton("full_decode", backend, q, obstacle):
        from dash_train.kernels.dash.triton.decode_attend import attend_lists

        lists = lists or list_all_chunks(lengths, capacity, kv_heads)
        return attend_lists(q, k_cache, v_cache, lists, DashConfig(CHUNK_SIZE, 1.0, "none", 1.0))

    # The heads of a group stand as so many queries of their KV head, none of them masked from another's keys.
    grouped_q = q.unflatten(1, (kv_heads, -1))
    is_written = (torch.arange(capacity, device=q.device) < lengths[:, None])[:, None, None]
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(grouped_q, k, v, attn_mask=is_written).flatten(1, 2)


def list_all_chunks(lengths: Tensor, capacity: int, kv_heads: int) -> ChunkLists:
    """The lists `[batch, kv_heads, ...]` of full_decode for lengths `[batch]` in caches of `capacity` tokens."""
    batch, chunks = len(lengths), -(-capacity // CHUNK_SIZE)
    return ChunkLists(
        chunks=torch.arange(chunks, dtype=torch.int32, device=lengths.device).repeat(batch, kv_heads, 1),
        log_pbar=torch.zeros(batch, kv_heads, chunks, device=lengths.device),
        keys=lengths.int()[:, None].repeat(1, kv_heads),
        normalizer=torch.zeros(batch, kv_heads, device=lengths.device),
    )
