"""Decoding with full attention: the newest token of each sequence over all of its cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dash_train.kernels.dash.checks import (
    BACKENDS,
    check_choice,
    check_dimensions,
    check_group,
    check_same_kind,
    check_shape,
)
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.decode import use_triton

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
    check_dimensions("q", q, "batch", "heads", "head_dim")
    check_dimensions("k_cache", k_cache, "batch", "capacity", "kv_heads", "head_dim")
    batch, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, batch=batch, capacity=capacity, kv_heads=kv_heads, head_dim=head_dim)
        check_same_kind(name, cache, q)
    check_shape("lengths", lengths, batch=batch)
    check_group(heads, kv_heads)
    if lists is not None:
        check_shape("lists", lists.chunks, batch=batch, kv_heads=kv_heads, chunks=-(-capacity // CHUNK_SIZE))
    check_choice("backend", backend, BACKENDS)
    if use_triton("full_decode", backend, q, (q, k_cache, v_cache), CHUNK_SIZE):
        from dash_train.kernels.dash.triton.decode_attend import attend_lists  # triton, which only this backend needs

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
