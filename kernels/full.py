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
from dash_train.kernels.dash.decode import use_triton
from dash_train.kernels.dash.stages import DashConfig

CHUNK_SIZE = 64


@torch.no_grad()
def full_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, backend: str = "auto") -> Tensor:
    """Softmax attention of the newest token of each sequence to its first `lengths` keys.

    Args:
        q: [batch, heads, head_dim].
        k_cache, v_cache: [batch, capacity, kv_heads, head_dim]; what lies beyond `lengths` is not read.
        lengths: [batch] int32, from 1 to capacity.
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
    check_choice("backend", backend, BACKENDS)
    if use_triton("full_decode", backend, q, (q, k_cache, v_cache), CHUNK_SIZE):
        return _attend_all_chunks(q, k_cache, v_cache, lengths)

    # The heads of a group stand as so many queries of their KV head, none of them masked from another's keys.
    grouped_q = q.unflatten(1, (kv_heads, -1))
    is_written = (torch.arange(capacity, device=q.device) < lengths[:, None])[:, None, None]
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(grouped_q, k, v, attn_mask=is_written).flatten(1, 2)


def _attend_all_chunks(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    from dash_train.kernels.dash.decode_attend import attend_lists  # triton, which only this backend needs
    from dash_train.kernels.dash.decode_routing import ChunkLists

    batch, capacity, kv_heads = k_cache.shape[:3]
    chunks = torch.arange(-(-capacity // CHUNK_SIZE), dtype=torch.int32, device=q.device)
    lists = ChunkLists(
        chunks=chunks.repeat(batch, kv_heads, 1),
        log_pbar=torch.zeros(batch, kv_heads, len(chunks), device=q.device),
        keys=lengths.int()[:, None].repeat(1, kv_heads),
        normalizer=torch.zeros(batch, kv_heads, device=q.device),
    )
    return attend_lists(q, k_cache, v_cache, lists, DashConfig(CHUNK_SIZE, 1.0, "none", 1.0))
