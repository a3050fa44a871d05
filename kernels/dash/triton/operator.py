"""DashAttention in Triton as one node of autograd: two operators of torch.library, the forward and the backward pass.

As operators they work under torch.compile, which sees them as opaque calls, and under activation checkpointing, where a
selective policy may keep the results of torch.ops.dash_train.dash_attention.default instead of computing them again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.common.operators import differentiate, operator
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.stats import DashStats, RoutingCounts, by_token, count_eligible
from dash_train.kernels.dash.triton.backward import dash_backward
from dash_train.kernels.dash.triton.forward import dash_forward
from dash_train.kernels.dash.triton.restore import Kept
from dash_train.kernels.dash.triton.routing import new_routing, route_segment
from dash_train.kernels.dash.triton.summaries import summarize_chunks
from dash_train.kernels.dash.triton.tiles import Shape, new_lists, shape_of


def dash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
    return_stats: bool,
) -> tuple[Tensor, DashStats | None]:
    """The output, like q, and the statistics if they are wanted.

    Arguments as in dash_attention, checked; document_starts [batch or 1, seq].
    """
    out, _, *kept, active_chunks, residual = call_forward(
        q, k, v, chunk_query, router_q, document_starts, query_starts, *config
    )
    tau, row_max, normalizer, lengths = kept[:4]
    if not return_stats:
        return out, None
    shape = shape_of(q, k, config.chunk_size, config.routing_block)
    stats = DashStats(
        block_tau=tau,
        block_row_max=row_max,
        block_normalizer=normalizer,
        counts=RoutingCounts(
            active_chunks=active_chunks,
            union_chunks=None if shape.list_tiles > 1 else lengths,
            residual=residual.amax(),
            tile=shape.tile_tokens,
            block=shape.routing_block,
            tokens=shape.q_len,
        ),
        pieces=len(query_starts),
        count_eligible=lambda: count_eligible(document_starts, query_starts, shape.q_len, config.chunk_size),
        support=lambda: _support(q, k, chunk_query, router_q, config, document_starts, query_starts),
    )
    return out, stats


@operator("dash_attention")
def forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    document_starts: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    routing_scale: float,
    prior_normalizer: str,
    prior_temperature: float,
    routing_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dash_forward: out, lse, the seven of Kept, active_chunks, residual. `out` has a gradient."""
    q, k, v = (aligned_for_tma(t) for t in (q, k, v))
    router_q = None if router_q is None else router_q.contiguous()
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block)
    result = dash_forward(
        q, k, v, chunk_query, router_q, config=config, document_starts=document_starts, query_starts=tuple(query_starts)
    )
    return result.out, result.lse, *result.kept, result.prior.active_chunks, result.routing.residual


@operator("dash_attention_backward")
def backward_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tau: Tensor,
    row_max: Tensor,
    normalizer: Tensor,
    lengths: Tensor,
    bits: Tensor,
    summaries: Tensor,
    parts: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    routing_scale: float,
    prior_normalizer: str,
    prior_temperature: float,
    routing_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dash_backward: the gradients of q, k, v, chunk_query and router_q, the last empty where there is none."""
    dout, q, k, v = (aligned_for_tma(t) for t in (dout.contiguous(), q, k, v))
    router_q = None if router_q is None else router_q.contiguous()
    dq, dk, dv, dchunk_query, drouter_q = dash_backward(
        dout,
        q,
        k,
        v,
        chunk_query,
        router_q,
        out,
        lse,
        Kept(tau, row_max, normalizer, lengths, bits, summaries, parts),
        config=DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature, routing_block),
        query_starts=tuple(query_starts),
    )
    return dq, dk, dv, dchunk_query, q.new_empty(0) if drouter_q is None else drouter_q


@torch.library.register_fake(forward_operator)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    document_starts: Tensor,
    query_starts: Sequence[int],
    chunk_size: int,
    routing_scale: float,
    prior_normalizer: str,
    prior_temperature: float,
    routing_block: int,
) -> tuple[Tensor, ...]:
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], chunk_size, routing_block)
    pieces = len(query_starts)
    per_list = (shape.batch, shape.kv_heads, pieces * shape.lists(shape.q_len // pieces))
    tau, row_max = (q.new_empty(shape.batch, shape.heads, shape.q_blocks, dtype=torch.float32) for _ in range(2))
    normalizer = q.new_empty(shape.batch, shape.kv_heads, shape.q_blocks, dtype=torch.float32)
    summaries = q.new_empty(shape.batch, shape.chunks, shape.kv_heads, shape.head_dim, dtype=torch.float32)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(shape.batch, shape.kv_heads, shape.q_len, shape.group, dtype=torch.float32),
        tau,
        row_max,
        normalizer,
        q.new_empty(per_list, dtype=torch.int32),
        q.new_empty(*per_list, shape.words, dtype=torch.int32),
        summaries,
        q.new_empty(1 if k.dtype == torch.float32 else 2, *summaries.shape),
        torch.empty_like(normalizer, dtype=torch.int32),
        q.new_empty(per_list, dtype=torch.float32),
    )


@torch.library.register_fake(backward_operator)
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor, router_q: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    inputs = (q, k, v, chunk_query, q.new_empty(0) if router_q is None else router_q)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, chunk_query, router_q, _, *ctx.options = inputs
    out, lse, *kept_and_statistics = output
    kept, statistics = kept_and_statistics[:-2], kept_and_statistics[-2:]
    ctx.save_for_backward(q, k, v, chunk_query, router_q, out, lse, *kept)
    ctx.mark_non_differentiable(lse, *kept, *statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    *gradients, drouter_q = call_backward(dout, *saved, *ctx.options)
    return *gradients, None if saved[4] is None else drouter_q, *[None] * (1 + len(ctx.options))


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "dash_attention with backend='triton' has no second derivative: leave out create_graph=True, or use "
        "backend='reference'"
    )


call_forward = differentiate(forward_operator, _save, _backward)
call_backward = differentiate(backward_operator, lambda ctx, inputs, output: None, _no_second_derivative)


def aligned_for_tma(t: Tensor) -> Tensor:
    """The tensor as TMA takes it, head vectors contiguous from multiples of 16 bytes on: itself, or a copy."""
    strides_in_bytes = [stride * t.element_size() for stride in t.stride()[:-1]]
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides_in_bytes):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _support(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Tensor:
    """bool [batch, heads, q_len, chunks]: r > 0. Routes again, to the same bits."""
    shape = shape_of(q, k, config.chunk_size, config.routing_block)
    routed_q = q if router_q is None else router_q.contiguous()
    _, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing = new_routing(shape, len(query_starts), q.device)
    support = torch.zeros(shape.batch, shape.heads, shape.q_blocks, parts.shape[2], dtype=torch.bool, device=q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(routed_q, parts, document_starts, config, shape, segment, lists, routing, support)
    return by_token(support, shape.routing_block, shape.q_len, 2)
