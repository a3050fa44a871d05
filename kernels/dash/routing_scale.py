"""Finding the routing scale at which a layer's density is a given number: `routing_scale: auto`."""

from collections.abc import Callable

import torch
from torch import Tensor

from dash_train.kernels.dash.attention import triton_obstacle
from dash_train.kernels.dash.stages import DashConfig, eligible_chunks, group_heads, route, summarize, whole_chunks
from dash_train.kernels.dash.stats import count_eligible

SCALES = (2.0**-6, 2.0**12)  # where the search looks
HALVINGS = 16  # of 18 octaves: the scale is found to 2^(18 / 2^16), 0.02 %
SAMPLE = 2**16  # queries that the search looks at, where there are more
RUN = 1024  # consecutive queries of the sample
SCORES_PER_BLOCK = 2**24  # elements of [batch, heads, rows, chunks] held at a time


@torch.no_grad()
def routing_density(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    *,
    routing_scale: float,
    chunk_size: int = 64,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    real: Tensor | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:
    """The density at one routing scale: routed over eligible (token, chunk) pairs, without stage 2.

    q, k, chunk_query, chunk_size, document_starts and query_starts are those of dash_attention. `real` (bool
    [batch, q_len], default all) marks the queries that count. Where other processes hold more queries or heads of the
    same rows, `add_up` sums counts (int64 [2]) over them. Returns 0 when nothing is eligible. Waits for the device.
    """
    batch, q_len, _, _ = q.shape
    if document_starts is None:
        document_starts = torch.zeros(1, k.shape[1], dtype=torch.int32, device=q.device)
    if real is None:
        real = torch.ones(1, q_len, dtype=torch.bool, device=q.device)
    config = DashConfig(chunk_size, routing_scale, "peak", 1.0)
    if q.is_cuda and not triton_obstacle(q, chunk_size):
        from dash_train.kernels.dash.routing_counts import routing_counts  # triton, which only CUDA needs

        active, _ = routing_counts(
            q, k, chunk_query, config=config, document_starts=document_starts, query_starts=query_starts
        )
    else:
        piece = q_len // len(query_starts)
        positions = torch.cat([torch.arange(start, start + piece, device=q.device) for start in query_starts])
        active = _active_chunks(q, k, chunk_query, config, positions, document_starts[:, positions])
    eligible = count_eligible(document_starts, query_starts, q_len, chunk_size) * real
    pairs = eligible.expand(batch, -1).sum() * k.shape[2]
    active, pairs = add_up(torch.stack([(active * real[:, None]).sum(), pairs]))
    return (active.double() / pairs.clamp(min=1)).item()


def _active_chunks(
    q: Tensor, k: Tensor, chunk_query: Tensor, config: DashConfig, positions: Tensor, starts: Tensor
) -> Tensor:
    """|R(t)| int64 [batch, kv_heads, q_len] in plain torch, block of rows by block.

    positions [q_len] are the queries', starts [batch or 1, q_len] where their documents begin.
    """
    batch, q_len, heads, _ = q.shape
    grouped_q = group_heads(q, k.shape[2])
    summaries = summarize(whole_chunks(k, config.chunk_size), chunk_query, config.chunk_size)
    size = max(1, SCORES_PER_BLOCK // (batch * heads * summaries.shape[2]))
    active = []
    for low in range(0, q_len, size):
        rows = slice(low, low + size)
        eligible = eligible_chunks(positions[None, rows], starts[:, rows], summaries.shape[2], config.chunk_size)
        active.append(route(grouped_q[:, :, :, rows], summaries, eligible, config.routing_scale).routed.sum(-1))
    return torch.cat(active, -1)


def find_routing_scale(
    q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    target: float,
    *,
    chunk_size: int = 64,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    real: Tensor | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:
    """The smallest routing scale, from 2^-6 to 2^12, whose density on this batch is at most `target`.

    Arguments as in routing_density; the result is the same on every run. Of more than 2^16 queries a row, runs of 1024
    evenly over the row stand for all: at 1M tokens each of 17 looks would else take most of a second. Density falls as
    the scale grows, down to a floor set by heads that disagree: a target below it is taken to be 1.02 times the density
    at 2^12.

    Raises: ValueError when target is not between 0 and 1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target is {target}, expected a density above 0 and at most 1")

    q, real, query_starts = _sample(q, real, query_starts, chunk_size)

    def density(scale: float) -> float:
        return routing_density(
            q,
            k,
            chunk_query,
            routing_scale=scale,
            chunk_size=chunk_size,
            document_starts=document_starts,
            query_starts=query_starts,
            real=real,
            add_up=add_up,
        )

    low, high = SCALES
    target = max(target, 1.02 * density(high))
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if density(middle) > target:
            low = middle
        else:
            high = middle
    return high


def _sample(
    q: Tensor, real: Tensor | None, query_starts: tuple[int, ...], chunk_size: int
) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """Runs of queries, as many from every piece, with their marks and where they stand; all of them if they are few."""
    piece = q.shape[1] // len(query_starts)
    runs = SAMPLE // RUN // len(query_starts)
    if q.shape[1] <= SAMPLE or not runs:
        return q, real, query_starts
    stride = (piece - RUN) // max(1, runs - 1) // chunk_size * chunk_size
    offsets = [run * stride for run in range(runs)]
    firsts = [number * piece + offset for number in range(len(query_starts)) for offset in offsets]
    places = (torch.tensor(firsts)[:, None] + torch.arange(RUN)).flatten().to(q.device)
    starts = tuple(start + offset for start in query_starts for offset in offsets)
    return q[:, places], None if real is None else real[:, places], starts
