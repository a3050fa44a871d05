"""The backward pass of DashAttention in Triton: segment by segment as the forward pass, whose lists it restores."""

import torch
from torch import Tensor

from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.attend_backward import attend_backward_segment, row_deltas
from dash_train.kernels.dash.triton.inverse import invert_lists
from dash_train.kernels.dash.triton.keys_backward import keys_backward_inputs, listed_keys_segment, own_keys_segment
from dash_train.kernels.dash.triton.restore import Kept, restore_segment
from dash_train.kernels.dash.triton.routing_backward import new_summary_gradients, routing_backward_segment
from dash_train.kernels.dash.triton.summaries_backward import summaries_backward
from dash_train.kernels.dash.triton.tiles import longest_first, new_lists, shape_of


def dash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    *,
    config: DashConfig,
    query_starts: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, chunk_query and router_q, in their types, contiguous.

    dout contiguous, like q; q, k and v as TMA takes them; out, lse and kept as dash_forward returned them.
    """
    shape = shape_of(q, k, config.chunk_size, config.routing_block)
    batch_heads = shape.batch * shape.kv_heads
    delta = row_deltas(out, dout, lse)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    routed_q, drouted_q = q, dq
    if router_q is not None:
        routed_q, drouted_q = router_q, torch.empty_like(router_q, memory_format=torch.contiguous_format)
    # Where queries are only some of the row's, no token has its own chunk in the others.
    new = torch.empty if shape.q_len == shape.seq else torch.zeros
    dk, dv = new(2, batch_heads, shape.seq, shape.head_dim, device=q.device)
    inputs = keys_backward_inputs(q, k, v, dout, lse, delta, shape)
    for segment in longest_first(shape, query_starts, backward=True):
        own_keys_segment(inputs, shape, segment, dk, dv)
    dsummaries = new_summary_gradients(shape, q.device)
    for segment, lists in new_lists(shape, query_starts, q.device, backward=True):
        restore_segment(routed_q, config, shape, segment, kept, lists)
        inverse = invert_lists(shape, segment, lists, kept.lengths)
        listed_keys_segment(inputs, q, dout, shape, segment, lists, inverse, dk, dv)
        # The gradients of the log-priors take their place, unless several tiles have a share in each.
        g = lists.prior
        if shape.list_tiles > 1:
            g = torch.empty(*lists.chunks.shape, shape.list_tiles, device=q.device)
        attend_backward_segment(q, k, v, dout, lse, delta, shape, segment, lists, kept.lengths, g, dq)
        routing_backward_segment(
            routed_q, config, shape, segment, lists, g, kept, drouted_q, dsummaries, add=router_q is None
        )
    dk_dv_dw = summaries_backward(k, chunk_query, kept.summaries, dk, dv, dsummaries, config.chunk_size)
    return dq, *dk_dv_dw, None if router_q is None else drouted_q
