"""The public function: checks its arguments, fills in what was left out and hands them to a backend."""

import os

import torch
from torch import Tensor

from dash_train.kernels.dash.checks import BACKENDS, check_choice, check_shape
from dash_train.kernels.dash.decode import chunk_summaries
from dash_train.kernels.vattention.checks import check_cache, check_chunks, check_config
from dash_train.kernels.vattention.reference.attention import VAttentionReport, vattention_reference
from dash_train.kernels.vattention.reference.population import VAttentionConfig, split_population


@torch.no_grad()
def vattention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    epsilon: float,
    delta: float,
    verify: str = "output",
    summaries: Tensor | None = None,
    chunk_bias: Tensor | None = None,
    seed: int | Tensor = 0,
    sink: int = 128,
    window: int = 128,
    heavy: float = 0.05,
    base_sample: int = 512,
    max_sample: float = 0.5,
    value_floor: float = 0.0,
    bounds: tuple[Tensor, Tensor] | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, VAttentionReport]:
    """Attention of the newest token of each sequence from a sample of its keys, with error above epsilon at most
    delta of the time (vAttention, arXiv 2510.05688; what differs from it is in docs/kernels.md).

    The interval is that of the central limit theorem: it takes for granted that the heaviest tokens are in the chunks
    that are read for certain. A lone heavy token in a chunk whose summary does not show it is what `bounds` are for.

    Args:
        q: [batch, heads, head_dim], after RoPE.
        k_cache, v_cache: [batch, capacity, kv_heads, head_dim]; what lies beyond `lengths` is not read.
        lengths: [batch] int32, from 1 to capacity, the new token included.
        epsilon: the largest relative error, in (0, 1).
        delta: how often it may be exceeded, in (0, 1), for each query head by itself.
        verify: "output", the error of o against max(|o|, value_floor rms(v)), or "denominator", that of the
            softmax's denominator.
        summaries: [batch, ceil(capacity / chunk_size), kv_heads, head_dim], of the complete chunks, as dash_decode
            has them: they rank the chunks. Default: mean keys, made in this call, which reads all keys; keep them in
            the cache for speed.
        chunk_bias: [batch, kv_heads, chunks] fp32, log-prior of each chunk; -inf: outside the population. The own
            chunk of a Dash model has 0. Default: all tokens, without prior.
        seed: of the sample, one for all rows or int64 [batch]; callers fold request, layer and step into it. A row's
            result depends on nothing but its own seed, length and inputs.
        sink, window: tokens at the start and at the end that are read for certain, rounded outwards to whole chunks.
        heavy: share of the population's chunks that is read for certain because their summaries weigh most.
        base_sample: tokens of the first sample, at least 2, from which the variances come.
        max_sample: a sample above this share of the residual is not taken: everything is read.
        value_floor: c, the smallest |o| that the error is relative to, in units of rms(v) = sqrt(mean |v|^2).
        bounds: (k_min, k_max), each like summaries: the smallest and the largest of each channel over the keys of
            every complete chunk. Chunks that cannot matter are then dropped for certain, chunks that can hide a needle
            are read for certain; where more than max_sample could, everything is read.
        chunk_size: tokens per chunk.
        backend: "reference" (torch), "triton" (CUDA, or CPU under TRITON_INTERPRET=1) or "auto": triton on CUDA
            where it can, else reference.

    Returns: [batch, heads, head_dim] in q's type, and the report.

    Raises: ValueError naming the argument, what it is and what was expected.
    """
    config = VAttentionConfig(
        epsilon, delta, verify, sink, window, heavy, base_sample, max_sample, value_floor, chunk_size
    )
    check_config(config)
    check_cache(q, k_cache, v_cache, lengths)
    check_chunks(k_cache, summaries, chunk_bias, bounds, chunk_size)
    if isinstance(seed, Tensor):
        check_shape("seed", seed, batch=q.shape[0])
    else:
        seed = torch.full((q.shape[0],), seed, dtype=torch.int64, device=q.device)

    check_choice("backend", backend, BACKENDS)
    obstacle = triton_obstacle(k_cache, chunk_size, [k_cache, v_cache, summaries, *(bounds or ())])
    if backend == "triton" and obstacle:
        raise ValueError(f"backend='triton' of vattention_decode {obstacle}: use backend='reference'")
    if backend == "triton" or (backend == "auto" and q.is_cuda and not obstacle):
        from dash_train.kernels.vattention.triton.pipeline import (
            vattention_triton,  # triton, which only this backend needs
        )

        return vattention_triton(q, k_cache, v_cache, lengths, summaries, chunk_bias, bounds, seed, config)[:2]
    if summaries is None:
        summaries = chunk_means(k_cache, chunk_size)
    population = split_population(q, summaries, lengths, chunk_bias, bounds, config)
    return vattention_reference(q, k_cache, v_cache, lengths, chunk_bias, seed, population, config)


def chunk_means(k_cache: Tensor, chunk_size: int) -> Tensor:
    """The mean keys of all chunks [batch, ceil(capacity / chunk_size), kv_heads, head_dim] fp32; the last, if it is
    incomplete, is zero."""
    batch, capacity, kv_heads, head_dim = k_cache.shape
    zero = k_cache.new_zeros(kv_heads, head_dim)
    means = k_cache.new_zeros(batch, -(-capacity // chunk_size), kv_heads, head_dim, dtype=torch.float32)
    means[:, : capacity // chunk_size] = chunk_summaries(k_cache, zero, chunk_size=chunk_size)
    return means


def triton_obstacle(k_cache: Tensor, chunk_size: int, rows: list[Tensor | None]) -> str | None:
    """Why the Triton kernels cannot run this call; None if they can."""
    types = {torch.bfloat16, torch.float16, torch.float32} if k_cache.is_cuda else {torch.float16, torch.float32}
    if not k_cache.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before the start"
    if k_cache.dtype not in types:
        return f"does not compute in {k_cache.dtype} on {k_cache.device.type}"
    if k_cache.shape[-1] > 256:
        return f"needs a head_dim up to 256, not {k_cache.shape[-1]}"
    if chunk_size & (chunk_size - 1):
        return f"needs a chunk_size that is a power of 2, not {chunk_size}"
    if any(x is not None and x.stride(-1) != 1 for x in rows):
        return "needs caches, summaries and bounds whose last dimension is contiguous"
    return None
