"""The part of attention's gradients that flows through the router, by itself: a diagnostic.

The backward pass adds it to the rest of dq; only here is it seen alone. chunk_query has no other gradient.
"""

from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash.attention import triton_obstacle
from dash_train.kernels.dash.reference import dash_attention_reference
from dash_train.kernels.dash.stages import DashConfig


def router_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    prior_normalizer: str = "geometric_mean",
    prior_temperature: float = 1.0,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of q through the router alone (fp32, or float64 of a float64 q) and of chunk_query.

    dout is the gradient of dash_attention's output; everything else as there. Costs a forward and a
    backward pass of the same backend.
    """
    config = DashConfig(chunk_size, routing_scale, prior_normalizer, prior_temperature)
    if document_starts is None:
        document_starts = torch.zeros(1, k.shape[1], dtype=torch.int32, device=q.device)
    q, k, v, chunk_query = (t.detach() for t in (q, k, v, chunk_query))
    obstacle = triton_obstacle(q, chunk_size)
    if backend == "triton" or (backend == "auto" and q.is_cuda and not obstacle):
        return _by_triton(dout, q, k, v, chunk_query, config, document_starts, query_starts)
    with torch.enable_grad():
        router_q = (q if q.dtype == torch.float64 else q.float()).clone().requires_grad_()
        chunk_query.requires_grad_()
        out, _ = dash_attention_reference(
            q,
            k,
            v,
            chunk_query,
            config=config,
            document_starts=document_starts,
            query_starts=query_starts,
            support=None,
            router_q=router_q,
        )
        dq, dchunk_query = torch.autograd.grad(out, (router_q, chunk_query), dout)
    return dq, dchunk_query


@torch.no_grad()
def _by_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    from dash_train.kernels.dash.backward import dash_backward  # triton, which only this backend needs
    from dash_train.kernels.dash.forward import dash_forward

    dout, q, k, v = (t.contiguous() for t in (dout, q, k, v))
    inputs = (q, k, v, chunk_query)
    options: dict[str, Any] = {"config": config, "query_starts": query_starts}
    forward = dash_forward(*inputs, **options, document_starts=document_starts)
    dq = torch.zeros_like(q, dtype=torch.float32)
    saved = (forward.out, forward.lse, forward.kept)
    *_, dchunk_query = dash_backward(dout, *inputs, *saved, **options, router_dq=dq)
    return dq, dchunk_query
