"""Checks of the arguments of vattention_decode. Each error names the argument, what it is and what was expected."""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import device_obstacle, stride_obstacle
from dash_train.kernels.common.checks import check_choice, check_per_chunk, check_shape
from dash_train.kernels.vattention.reference.population import VAttentionConfig
from dash_train.kernels.vattention.reference.sketch import PACKED

VERIFY = ("output", "denominator")
SAMPLERS = ("uniform", "sketch")


def triton_obstacle(k_cache: Tensor, chunk_size: int, rows: list[Tensor | None]) -> str | None:
    """Why the Triton kernels cannot read this cache and `rows`; None if they can."""
    if obstacle := device_obstacle(k_cache):
        return obstacle
    if k_cache.shape[-1] > 256:
        return f"needs a head_dim up to 256, not {k_cache.shape[-1]}"
    if chunk_size & (chunk_size - 1):
        return f"needs a chunk_size that is a power of 2, not {chunk_size}"
    return stride_obstacle(rows)


def check_chunks(
    k_cache: Tensor,
    summaries: Tensor | None,
    chunk_bias: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    chunk_size: int,
) -> None:
    """What is known of each chunk fits the cache."""
    k_min, k_max = bounds or (None, None)
    for name, keys in (("summaries", summaries), ("bounds[0]", k_min), ("bounds[1]", k_max)):
        if keys is not None:
            check_per_chunk(name, keys, k_cache, chunk_size)
    if chunk_bias is not None:
        batch, capacity, kv_heads, _ = k_cache.shape
        chunks = -(-capacity // chunk_size)
        check_shape("chunk_bias", chunk_bias, batch=batch, kv_heads=kv_heads, chunks=chunks)


def check_sketch(k_cache: Tensor, sketch: Tensor | None, bounds: tuple[Tensor, Tensor] | None, sampler: str) -> None:
    """A sketch fits the cache, has its scale and is wanted."""
    if sketch is None:
        return
    batch, capacity, kv_heads, head_dim = k_cache.shape
    if sampler != "sketch":
        raise ValueError(f"sketch is given with sampler={sampler!r}, expected sampler='sketch'")
    check_shape("sketch", sketch, batch=batch, capacity=capacity, kv_heads=kv_heads, bytes=-(-head_dim // PACKED))
    if sketch.dtype != torch.uint8:
        raise ValueError(f"sketch is {sketch.dtype}, expected torch.uint8, as make_sketch packs it")
    if bounds is None:
        raise ValueError("sketch is given without bounds, expected also the bounds that it was made with")


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
