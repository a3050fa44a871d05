"""Checks of the arguments of vattention_decode. Each error names the argument, what it is and what was expected."""

from torch import Tensor

from dash_train.kernels.dash.checks import check_choice, check_dimensions, check_group, check_same_kind, check_shape
from dash_train.kernels.vattention.reference.population import VAttentionConfig

VERIFY = ("output", "denominator")


def check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    """Queries, keys and values fit together. The values of lengths are not read: no host sync."""
    check_dimensions("q", q, "batch", "heads", "head_dim")
    check_dimensions("k_cache", k_cache, "batch", "capacity", "kv_heads", "head_dim")
    batch, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, batch=batch, capacity=capacity, kv_heads=kv_heads, head_dim=head_dim)
        check_same_kind(name, cache, q)
    check_group(heads, kv_heads)
    check_shape("lengths", lengths, batch=batch)


def check_chunks(
    k_cache: Tensor,
    summaries: Tensor | None,
    chunk_bias: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    chunk_size: int,
) -> None:
    """What is known of each chunk fits the cache."""
    batch, capacity, kv_heads, head_dim = k_cache.shape
    chunks = -(-capacity // chunk_size)
    k_min, k_max = bounds or (None, None)
    for name, keys in (("summaries", summaries), ("bounds[0]", k_min), ("bounds[1]", k_max)):
        if keys is not None:
            check_shape(name, keys, batch=batch, chunks=chunks, kv_heads=kv_heads, head_dim=head_dim)
    if chunk_bias is not None:
        check_shape("chunk_bias", chunk_bias, batch=batch, kv_heads=kv_heads, chunks=chunks)


def check_config(config: VAttentionConfig) -> None:
    """The plain numbers."""
    check_choice("verify", config.verify, VERIFY)
    for name in ("epsilon", "delta"):
        if not 0 < getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected a number between 0 and 1, both excluded")
    for name in ("heavy", "max_sample"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected a share from 0 to 1")
    for name, least in (("sink", 0), ("window", 0), ("base_sample", 2), ("value_floor", 0), ("chunk_size", 1)):
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {least}")
