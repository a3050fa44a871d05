"""The public function: checks its arguments, fills in what was left out and hands them to a backend."""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import use_triton
from dash_train.kernels.common.checks import check_caches, check_choice, check_shape
from dash_train.kernels.dash.decode import chunk_summaries
from dash_train.kernels.vattention.checks import SAMPLERS, check_chunks, check_config, check_sketch, triton_obstacle
from dash_train.kernels.vattention.reference.attention import VAttentionReport, vattention_reference
from dash_train.kernels.vattention.reference.importance import vattention_sketch
from dash_train.kernels.vattention.reference.population import VAttentionConfig, split_population
from dash_train.kernels.vattention.reference.proposal import split_for_sketch
from dash_train.kernels.vattention.reference.sketch import chunk_bounds, complete_bounds, make_sketch


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
    heavy: float | None = None,
    base_sample: int = 512,
    max_sample: float = 0.5,
    value_floor: float = 0.0,
    bounds: tuple[Tensor, Tensor] | None = None,
    chunk_size: int = 64,
    sampler: str = "uniform",
    sketch: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, VAttentionReport]:
    """Attention of the newest token of each sequence from a sample of its keys, with error above epsilon at most
    delta of the time (vAttention, arXiv 2510.05688; what differs from it is in docs/kernels.md).

    The interval is that of the central limit theorem. With sampler "uniform" it takes for granted that the heaviest
    tokens are in the chunks that are read for certain; a lone heavy token in a chunk whose summary does not show it is
    what `bounds` are for. With sampler "sketch" it takes for granted that the sketch shows such a token (what that
    means, and the derivation: docs/vattention.md).

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
        heavy: share of the population's chunks that is read for certain because their summaries weigh most. Default:
            .05; 0 with sampler "sketch", which finds heavy tokens one by one.
        base_sample: tokens of the first sample, at least 2, from which the variances come; with sampler "sketch" at
            most so many, on average.
        max_sample: a sample above this share of the residual is not taken: everything is read.
        value_floor: c, the smallest |o| that the error is relative to, in units of rms(v) = sqrt(mean |v|^2).
        bounds: (k_min, k_max), each like summaries: the smallest and the largest of each channel over the keys of
            every complete chunk. Chunks that cannot matter are then dropped for certain, chunks that can hide a needle
            are read for certain; where more than max_sample could, everything is read. With sampler "sketch" they are
            the scale of the sketch, made in this call if not given, and only drop chunks.
        chunk_size: tokens per chunk.
        sampler: "uniform", the paper's, in which every token of the residual is equally likely to be drawn, or
            "sketch", in which 2 bits a channel of every key say how likely.
        sketch: uint8 [batch, capacity, kv_heads, ceil(head_dim / 4)], of the complete chunks, as make_sketch packs it
            with the same bounds. Default with sampler "sketch": made in this call, which reads all keys.
        backend: "reference" (torch), "triton" (CUDA, or CPU under TRITON_INTERPRET=1) or "auto": triton on CUDA
            where it can, else reference. Sampler "sketch" has no Triton kernels yet.

    Returns: [batch, heads, head_dim] in q's type, and the report.

    Raises: ValueError naming the argument, what it is and what was expected.
    """
    check_choice("sampler", sampler, SAMPLERS)
    if heavy is None:
        heavy = 0.05 if sampler == "uniform" else 0.0
    config = VAttentionConfig(
        epsilon, delta, verify, sink, window, heavy, base_sample, max_sample, value_floor, chunk_size
    )
    check_config(config)
    check_caches(q, k_cache, v_cache, lengths)
    check_chunks(k_cache, summaries, chunk_bias, bounds, chunk_size)
    check_sketch(k_cache, sketch, bounds, sampler)
    if isinstance(seed, Tensor):
        check_shape("seed", seed, batch=q.shape[0])
    else:
        seed = torch.full((q.shape[0],), seed, dtype=torch.int64, device=q.device)

    obstacle = "has no sampler='sketch'" if sampler == "sketch" else None
    obstacle = obstacle or triton_obstacle(k_cache, chunk_size, [k_cache, v_cache, summaries, *(bounds or ())])
    if use_triton("vattention_decode", backend, q, obstacle):
        from dash_train.kernels.vattention.triton.pipeline import vattention_triton

        return vattention_triton(q, k_cache, v_cache, lengths, summaries, chunk_bias, bounds, seed, config)[:2]
    if summaries is None:
        summaries = chunk_means(k_cache, chunk_size)
    if sampler == "sketch":
        bounds = complete_bounds(bounds or chunk_bounds(k_cache, chunk_size), lengths, chunk_size)
        if sketch is None:
            sketch = make_sketch(k_cache, bounds, chunk_size)
        chunks = split_for_sketch(q, summaries, lengths, chunk_bias, bounds, config)
        return vattention_sketch(q, k_cache, v_cache, lengths, chunk_bias, seed, chunks, sketch, bounds, config)
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
