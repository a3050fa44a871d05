"""DashAttention in Triton as one node of autograd: two operators of torch.library, the forward and the backward pass.

As operators they work under torch.compile, which sees them as opaque calls, and under activation checkpointing, where a
selective policy may keep the results of torch.ops.dash_train.dash_attention.default instead of computing them again.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash.backward import dash_backward
from dash_train.kernels.dash.forward import dash_forward
from dash_train.kernels.dash.restore import Kept
from dash_train.kernels.dash.routing import new_routing, route_segment
from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.stats import DashStats, count_eligible
from dash_train.kernels.dash.summaries import summarize_chunks
from dash_train.kernels.dash.tiles import new_lists, shape_of


def dash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
    return_stats: bool,
) -> tuple[Tensor, DashStats | None]:
    """The output, like q, and the statistics if they are wanted.

    Arguments as in dash_attention, checked; document_starts [batch or 1, seq].
    """
    out, _, tau, row_max, normalizer, union_chunks, _, active_chunks, residual = forward_operator(
        q, k, v, chunk_query, document_starts, query_starts, *astuple(config)
    )
    if not return_stats:
        return out, None
    shape = shape_of(q, k, config.chunk_size)
    stats = DashStats(
        tau=tau,
        row_max=row_max,
        normalizer=normalizer,
        active_chunks=active_chunks,
        union_chunks=union_chunks,
        residual=residual.amax(),
        tile=shape.tile_tokens,
        pieces=len(query_starts),
        count_eligible=lambda: count_eligible(document_starts, query_starts, shape.q_len, config.chunk_size),
        support=lambda: _support(q, k, chunk_query, config, document_starts, query_starts),
    )
    return out, stats


@torch.library.custom_op("dash_train::dash_attention", mutates_args=())
def forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    document_starts: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    routing_scale: float,
    prior_normalizer: str,
    prior_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dash_forward: out, lse, the five of Kept, active_chunks, residual. `out` has a gradient."""
    q, k, v = (_for_the_copy_engine(t) for t in (q, k, v))
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    forward = dash_forward(
        q, k, v, chunk_query, config=config, document_starts=document_starts, query_starts=tuple(query_starts)
    )
    return forward.out, forward.lse, *forward.kept, forward.prior.active_chunks, forward.routing.residual


@torch.library.custom_op("dash_train::dash_attention_backward", mutates_args=())
def backward_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    out: Tensor,
    lse: Tensor,
    tau: Tensor,
    row_max: Tensor,
    normalizer: Tensor,
    union_chunks: Tensor,
    union_bits: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    routing_scale: float,
    prior_normalizer: str,
    prior_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dash_backward: the gradients of q, k, v and chunk_query."""
    dout, q, k, v = (_for_the_copy_engine(t) for t in (dout.contiguous(), q, k, v))
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    return dash_backward(
        dout,
        q,
        k,
        v,
        chunk_query,
        out,
        lse,
        Kept(tau, row_max, normalizer, union_chunks, union_bits),
        config=config,
        query_starts=tuple(query_starts),
    )


@forward_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    document_starts: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    shape = shape_of(q, k, chunk_size)
    pieces = len(query_starts)
    per_tile = (shape.batch, shape.kv_heads, pieces * shape.tiles(shape.q_len // pieces))
    lse, tau, row_max = (q.new_empty(shape.batch, shape.heads, shape.q_len, dtype=torch.float32) for _ in range(3))
    normalizer = q.new_empty(shape.batch, shape.kv_heads, shape.q_len, dtype=torch.float32)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        lse,
        tau,
        row_max,
        normalizer,
        q.new_empty(per_tile, dtype=torch.int32),
        q.new_empty(*per_tile, shape.words, dtype=torch.int32),
        torch.empty_like(normalizer, dtype=torch.int32),
        q.new_empty(per_tile, dtype=torch.float32),
    )


@backward_operator.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, chunk_query))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, chunk_query, _, *ctx.options = inputs
    out, lse, tau, row_max, normalizer, union_chunks, union_bits, *statistics = output
    kept = (tau, row_max, normalizer, union_chunks, union_bits)
    ctx.save_for_backward(q, k, v, chunk_query, out, lse, *kept)
    ctx.mark_non_differentiable(lse, *kept, *statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    gradients = backward_operator(dout, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * (1 + len(ctx.options))


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "dash_attention with backend='triton' has no second derivative: leave out create_graph=True, or use "
        "backend='reference'"
    )


forward_operator.register_autograd(_backward, setup_context=_save)
backward_operator.register_autograd(_no_second_derivative)


def _for_the_copy_engine(t: Tensor) -> Tensor:
    """As it is if head vectors are contiguous and every one starts on a multiple of 16 bytes, else a copy."""
    strides_in_bytes = [stride * t.element_size() for stride in t.stride()[:-1]]
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides_in_bytes):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _support(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Tensor:
    """bool [batch, heads, q_len, chunks]: r > 0. Routes again, to the same bits."""
    shape = shape_of(q, k, config.chunk_size)
    _, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    support = torch.zeros(shape.batch, shape.heads, shape.q_len, parts.shape[2], dtype=torch.bool, device=q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(q, parts, document_starts, config, shape, segment, lists, routing, support)
    return support
