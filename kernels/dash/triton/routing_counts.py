"""What the router does with a batch, found by the Triton kernels of stages 0 and 1 alone: no attention is computed."""

from torch import Tensor

from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.lists import list_segment, new_prior
from dash_train.kernels.dash.triton.routing import new_routing, route_segment
from dash_train.kernels.dash.triton.summaries import summarize_chunks
from dash_train.kernels.dash.triton.tiles import new_lists, shape_of


def routing_counts(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    router_q: Tensor | None = None,
    *,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...] = (0,),
) -> tuple[Tensor, Tensor | None]:
    """|R(t)| of every routing block, and of every tile the size of its union: both as in RoutingCounts.

    Arguments as in dash_attention; document_starts [batch or 1, seq].
    """
    q, k = q.contiguous(), k.contiguous()
    routed_q = q if router_q is None else router_q.contiguous()
    shape = shape_of(q, k, config.chunk_size, config.routing_block)
    _, parts = summarize_chunks(k, chunk_query, config.chunk_size)
    routing, prior = new_routing(shape, len(query_starts), q.device), new_prior(shape, q.device)
    for segment, lists in new_lists(shape, query_starts, q.device):
        route_segment(routed_q, parts, document_starts, config, shape, segment, lists, routing)
        list_segment(config, shape, segment, lists, routing, prior)
    return prior.active_chunks, None if shape.list_tiles > 1 else routing.lengths
