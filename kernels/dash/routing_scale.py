"""Finding the routing scale at which a layer's density is a given number: `routing_scale: auto`."""

from collections.abc import Callable

import torch
from torch import Tensor

from dash_train.kernels.dash.checks import triton_obstacle
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import eligible_chunks, group_heads, route, summarize, whole_chunks
from dash_train.kernels.dash.stats import by_token, count_eligible

SCALES = (2.0**-6, 2.0**12)  # where the search looks
HALVINGS = 16  # of 18 octaves: the scale is found to 2^(18 / 2^16), 0.02 %
RUNS = 32  # of consecutive blocks in a row's sample: the kernels are launched for each
SCORES_PER_BLOCK = 2**24  # elements of [batch, heads, blocks, chunks] held at a time


@torch.no_grad()
def routing_density(
    router_q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    *,
    routing_scale: float,
    chunk_size: int = 64,
    routing_block: int = 1,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    real: Tensor | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:
    """The density at one routing scale: routed over eligible (token, chunk) pairs, without stage 2.

    router_q [batch, blocks, heads, head_dim] holds the routers' queries of the tokens that query_starts place in the
    row (the tokens' own q with a routing_block of 1); all other arguments are those of dash_attention. `real` (bool
    [batch, tokens], default all) marks the tokens that count. Where other processes hold more queries or heads of the
    same rows, `add_up` sums counts (int64 [2]) over them. Returns 0 when nothing is eligible. Waits for the device.
    """
    batch, seq, kv_heads, _ = k.shape
    if document_starts is None:
        document_starts = torch.zeros(1, seq, dtype=torch.int32, device=k.device)
    tokens = _tokens(router_q, seq, query_starts, routing_block)
    if real is None:
        real = torch.ones(1, tokens, dtype=torch.bool, device=k.device)
    config = DashConfig(chunk_size, routing_scale, "peak", 1.0, routing_block)
    active = _active_chunks(router_q, k, chunk_query, config, document_starts, query_starts)
    active = by_token(active, routing_block, tokens)
    eligible = count_eligible(document_starts, query_starts, tokens, chunk_size) * real
    pairs = eligible.expand(batch, -1).sum() * kv_heads
    active, pairs = add_up(torch.stack([(active * real[:, None]).sum(), pairs]))
    return (active.double() / pairs.clamp(min=1)).item()


def _tokens(router_q: Tensor, seq: int, query_starts: tuple[int, ...], routing_block: int) -> int:
    """How many tokens the blocks are: only that at the end of the row may be cut short."""
    piece = router_q.shape[1] // len(query_starts) * routing_block
    return sum(min(piece, seq - start) for start in query_starts)


def _active_chunks(
    router_q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    config: DashConfig,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
) -> Tensor:
    """|R(t)| of each routing block, [batch, kv_heads, blocks]."""
    if router_q.is_cuda and not triton_obstacle(router_q, config.chunk_size):
        from dash_train.kernels.dash.triton.routing_counts import routing_counts

        tokens = _tokens(router_q, k.shape[1], query_starts, config.routing_block)
        q = by_token(router_q, config.routing_block, tokens, dim=1)  # only its shape counts
        active_chunks, _ = routing_counts(
            q, k, chunk_query, router_q, config=config, document_starts=document_starts, query_starts=query_starts
        )
        return active_chunks

    batch, blocks, heads, _ = router_q.shape
    in_piece = torch.arange(blocks // len(query_starts), device=k.device) * config.routing_block
    positions = (torch.tensor(query_starts, device=k.device)[:, None] + in_piece).flatten()
    starts = document_starts[:, positions]
    grouped_q = group_heads(router_q, k.shape[2])
    summaries = summarize(whole_chunks(k, config.chunk_size), chunk_query, config.chunk_size)
    size = max(1, SCORES_PER_BLOCK // (batch * heads * summaries.shape[2]))
    active = []
    for low in range(0, blocks, size):
        rows = slice(low, low + size)
        eligible = eligible_chunks(positions[None, rows], starts[:, rows], summaries.shape[2], config.chunk_size)
        active.append(route(grouped_q[:, :, :, rows], summaries, eligible, config.routing_scale).routed.sum(-1))
    return torch.cat(active, -1)


def find_routing_scale(
    router_q: Tensor,
    k: Tensor,
    chunk_query: Tensor,
    target: float,
    *,
    chunk_size: int = 64,
    routing_block: int = 1,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    real: Tensor | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:
    """The smallest routing scale, from 2^-6 to 2^12, whose density on this batch is at most `target`.

    Arguments as in routing_density; the result is the same on every run. Density falls as the scale grows, down to a
    floor set by heads that disagree: a target below it is taken to be 1.02 times the density at 2^12. Looks 17 times:
    of many tokens, sample_blocks' may stand for all.

    Raises: ValueError when target is not between 0 and 1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target is {target}, expected a density above 0 and at most 1")

    def density(scale: float) -> float:
        return routing_density(
            router_q,
            k,
            chunk_query,
            routing_scale=scale,
            chunk_size=chunk_size,
            routing_block=routing_block,
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


def sample_blocks(
    router_q: Tensor,
    real: Tensor,
    query_starts: tuple[int, ...],
    blocks: int,
    *,
    seq: int,
    chunk_size: int = 64,
    routing_block: int = 1,
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(router_q, real, query_starts) of some `blocks` blocks a row of `seq` tokens: short runs, evenly over all pieces.

    Arguments as in routing_density, of pieces of whole chunks. A run begins with a chunk, as pieces must, and a long
    one is whole chunks. Everything where there is no more. However a row is divided into pieces, together they are
    asked for the same blocks.
    """
    pieces, piece = len(query_starts), real.shape[1] // len(query_starts)
    chunks = piece // chunk_size
    runs = max(1, min(RUNS * piece // seq, chunks))
    run = max(1, blocks * piece // (seq * runs)) * routing_block
    run -= run % chunk_size if run > chunk_size else 0
    if run * runs >= piece:
        return router_q, real, query_starts
    margin = (chunks / runs - run / chunk_size) / 2  # each run in the middle of its part of the piece
    firsts = torch.linspace(margin, chunks - margin - run / chunk_size, runs).round().long() * chunk_size
    starts = tuple(start + first for start in query_starts for first in firsts.tolist())
    in_piece = (firsts[:, None] + torch.arange(run)).flatten()
    places = (torch.arange(pieces)[:, None] * piece + in_piece).flatten().to(real.device)
    return router_q[:, places[::routing_block] // routing_block], real[:, places], starts
