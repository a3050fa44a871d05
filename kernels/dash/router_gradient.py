"""The part of attention's gradients that flows through the router, by itself: a diagnostic.

The backward pass adds it to the rest of dq; only here is it seen alone. chunk_query has no other gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash.attention import dash_attention


def router_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    make_router_q: Callable[[Tensor], Tensor] = lambda q: q,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of q through the router alone and of chunk_query.

    dout is the gradient of dash_attention's output, make_router_q the function of q that gives its router_q
    (router_queries; by default q itself); everything else as there. Costs a forward and a backward pass.
    """
    q, k, v = (t.detach() for t in (q, k, v))
    seen, chunk_query = (t.detach().requires_grad_() for t in (q, chunk_query))
    with torch.enable_grad():
        out = dash_attention(q, k, v, chunk_query, router_q=make_router_q(seen), **options)
        dq, dchunk_query = torch.autograd.grad(out, (seen, chunk_query), dout)
    return dq, dchunk_query
