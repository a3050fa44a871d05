"""Inputs for vAttention, exact attention to compare with, and how Triton is held against the reference."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.vattention.decode import chunk_means
from dash_train.kernels.vattention.reference.attention import VAttentionReport, vattention_reference
from dash_train.kernels.vattention.reference.population import Population, VAttentionConfig, split_population
from dash_train.kernels.vattention.triton.pipeline import vattention_triton
from dash_train.kernels.vattention.triton.workspace import (
    CERTAIN_CHUNKS,
    DROPPED_CHUNKS,
    RESIDUAL_CHUNKS,
    SAMPLE,
    UNBOUNDED_CHUNKS,
    Workspace,
)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    summaries: Tensor
    chunk_bias: Tensor | None
    bounds: tuple[Tensor, Tensor] | None
    seed: Tensor


def make_config(**changes: Any) -> VAttentionConfig:
    """Small enough for a few hundred tokens in chunks of 16."""
    options: dict[str, Any] = {"epsilon": 0.3, "delta": 0.1, "verify": "output", "sink": 20, "window": 20, "heavy": 0.1}
    options |= {"base_sample": 24, "max_sample": 0.5, "value_floor": 0.1, "chunk_size": 16}
    return VAttentionConfig(**{**options, **changes})


def make_inputs(
    lengths: tuple[int, ...] = (700, 333),
    capacity: int = 700,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    chunk_size: int = 16,
    prior: bool = False,
    bounds: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Beyond the lengths there is NaN. With bounds, heads look at channel 0 alone, so that the bounds are tight; it
    makes a needle every 150 tokens and a stretch of keys that cannot matter."""
    batch, chunks = len(lengths), -(-capacity // chunk_size)
    q = torch.randn(batch, group * kv_heads, head_dim, device=device)
    k = torch.randn(batch, capacity, kv_heads, head_dim, device=device)
    v = 1 + torch.randn(batch, capacity, kv_heads, head_dim, device=device)
    if bounds:
        q = q * 0
        q[..., 0] = 5.0
        k[..., 0] *= 0.3
        k[:, 7::150, :, 0] = 8.0
        k[:, 160:240, :, 0] = -60.0
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = torch.nan, torch.nan
    q, k, v = (x.to(dtype) for x in (q, k, v))
    chunk_bias = None
    if prior:
        chunk_bias = torch.randn(batch, kv_heads, chunks, device=device)
        chunk_bias[torch.rand_like(chunk_bias) < 0.3] = -torch.inf
        for row, length in enumerate(lengths):
            chunk_bias[row, :, (length - 1) // chunk_size] = 0
    pages = None
    if bounds:
        whole = k[:, : capacity // chunk_size * chunk_size].unflatten(1, (-1, chunk_size)).float()
        k_min, k_max = torch.zeros(2, batch, chunks, kv_heads, head_dim, device=device)
        k_min[:, : whole.shape[1]], k_max[:, : whole.shape[1]] = whole.amin(2), whole.amax(2)
        pages = (k_min, k_max)
    seed = torch.arange(batch, device=device) * 2**40 + 5
    numbers = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Inputs(q, k, v, numbers, chunk_means(k, chunk_size), chunk_bias, pages, seed)


def exact_attention(inputs: Inputs, chunk_size: int = 16) -> Tensor:
    """In float64, row by row."""
    outputs = []
    for row, length in enumerate(inputs.lengths.tolist()):
        k, v = (x[row, :length].double().transpose(0, 1) for x in (inputs.k, inputs.v))
        logits = inputs.q[row].double().unflatten(0, (len(k), -1)) * k.shape[-1] ** -0.5 @ k.mT
        if inputs.chunk_bias is not None:
            bias = inputs.chunk_bias[row].double().repeat_interleave(chunk_size, -1)[:, None, :length]
            logits = logits + bias
        outputs.append((logits.softmax(-1) @ v).flatten(0, 1))
    return torch.stack(outputs)


def triton_and_reference(
    inputs: Inputs, config: VAttentionConfig
) -> tuple[tuple[Tensor, VAttentionReport], tuple[Tensor, VAttentionReport], Population, Population]:
    """Triton's result, that of the reference in float64 with Triton's own chunks and sample size, both, as Triton chose
    them, and the population in which the reference would have split the chunks."""
    out, report, work = vattention_triton(*inputs, config)
    population = chosen_chunks(work, inputs)
    budget = work.counts[SAMPLE.value].view(len(inputs.q), -1).long()
    q, k, v = (x.double() for x in inputs[:3])
    truth = vattention_reference(
        q, k, v, inputs.lengths, inputs.chunk_bias, inputs.seed, population, config, budget=budget
    )
    own = split_population(inputs.q, inputs.summaries, inputs.lengths, inputs.chunk_bias, inputs.bounds, config)
    return (out, report), truth, population, own


def chosen_chunks(work: Workspace, inputs: Inputs) -> Population:
    """Triton's lists as the reference's masks."""
    batch, kv_heads = len(inputs.q), inputs.k.shape[2]
    counts = work.counts.view(-1, batch, kv_heads, 1)
    place = torch.arange(work.order.shape[1], device=work.order.device)
    order = work.order.view(batch, kv_heads, -1).long()
    masks, end = [], torch.zeros_like(counts[0])
    for row in (CERTAIN_CHUNKS.value, RESIDUAL_CHUNKS.value, DROPPED_CHUNKS.value):
        begin, end = end, end + counts[row]
        listed = (place >= begin) & (place < end)
        chunks = torch.where(listed, order, order.shape[-1])
        mask = torch.zeros(batch, kv_heads, order.shape[-1] + 1, dtype=torch.bool, device=order.device)
        masks.append(mask.scatter_(-1, chunks, True)[..., :-1])
    unbounded = counts[UNBOUNDED_CHUNKS.value][..., 0].long()
    return Population(*masks, unbounded=unbounded, least_sample=torch.zeros_like(unbounded))
