"""The backward pass of DashAttention in Triton: segment by segment as the forward pass, whose lists it restores."""

import torch
from torch import Tensor

from dash_train.kernels.dash.attend_backward import attend_backward_segment, row_deltas
from dash_train.kernels.dash.inverse import invert_lists
from dash_train.kernels.dash.keys_backward import keys_backward_segment
from dash_train.kernels.dash.restore import Kept, restore_segment
from dash_train.kernels.dash.routing_backward import routing_backward_segment
from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.summaries import summarize_chunks
from dash_train.kernels.dash.summaries_backward import summaries_backward
from dash_train.kernels.dash.tiles import new_lists, shape_of


def dash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    *,
    config: DashConfig,
    query_starts: tuple[int, ...],
    router_dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and chunk_query, in their types, contiguous.

    dout contiguous, like q; q, k and v as the copy engine wants them; out, lse and kept as dash_forward returned them.
    router_dq (zeros like q, of any floating type) takes the router's part of dq, which the result then lacks.
    """
    shape = shape_of(q, k, config.chunk_size)
    sequences = shape.batch * shape.kv_heads
    delta = row_deltas(out, dout)
    summaries, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros(2, sequences, shape.seq, shape.head_dim, device=q.device)
    dsummaries = torch.zeros(sequences, summaries.shape[1], shape.head_dim, device=q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        restore_segment(q, parts, config, shape, segment, kept, lists)
        inverse = invert_lists(shape, segment, lists, kept.union_chunks)
        keys_backward_segment(q, k, v, dout, lse, delta, shape, segment, lists, inverse, dk, dv)
        # From here on `lists` holds the gradients of the log-priors in their place.
        attend_backward_segment(q, k, v, dout, lse, delta, shape, segment, lists, kept.union_chunks, dq)
        into = dq if router_dq is None else router_dq
        routing_backward_segment(q, parts, config, shape, segment, lists, kept, into, dsummaries)
    return dq, *summaries_backward(k, chunk_query, summaries, dk, dv, dsummaries, config.chunk_size)
