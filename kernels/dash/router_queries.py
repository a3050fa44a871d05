"""The routers' queries of routing blocks: the mean of the last queries up to each block's first token.

Nothing after a block's first token enters, so routing is causal though all of a block's tokens share it.
"""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import use_triton
from dash_train.kernels.common.checks import check_dimensions, check_same_kind, check_shape
from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.dash.checks import check_documents, check_pieces, triton_obstacle


def router_queries(
    q: Tensor,
    document_starts: Tensor | None = None,
    query_starts: tuple[int, ...] = (0,),
    block: int = 1,
    window: int = 1,
    before: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Of each routing block, the mean of the `window` queries of its document that end with the block's first token.

    Args:
        q: [batch, q_len, heads, head_dim], after RoPE.
        document_starts: integer [batch, seq], the row position at which each token's document begins; default one
            document a row.
        query_starts: as in dash_attention: q is this many equal pieces, of whole blocks if they are several, and piece
            i stands at row positions query_starts[i], +1, ...
        block: tokens of a routing block.
        window: queries in a mean; fewer where the document began less than so many tokens ago.
        before: [batch, pieces, window - 1, heads, head_dim], the queries just before each piece; those before the row's
            first position are not looked at. Needed where they are in none of the pieces.
        backend: as in dash_attention.

    Returns: [batch, ceil(q_len / block), heads, head_dim] in q's type, differentiable; q itself for 1 and 1.

    Raises: ValueError naming the argument, what it is and what was expected.
    """
    check_dimensions("q", q, "batch", "q_len", "heads", "head_dim")
    if block < 1 or window < 1:
        raise ValueError(f"block is {block} and window is {window}, expected at least 1 each")
    check_pieces(q, query_starts, "block", block)
    batch, q_len, heads, head_dim = q.shape
    pieces = len(query_starts)
    on_triton = use_triton("router_queries", backend, q, triton_obstacle(q))
    if document_starts is None:
        document_starts = torch.zeros(1, max(query_starts) + q_len // pieces, dtype=torch.int32, device=q.device)
    else:
        check_documents(document_starts, batch, document_starts.shape[-1])
    if block == 1 and window == 1:
        return q
    if before is not None:
        check_shape("before", before, batch=batch, pieces=pieces, queries=window - 1, heads=heads, head_dim=head_dim)
        check_same_kind("before", before, q)
    elif window > 1 and any(query_starts):
        before = _from_other_pieces(q, query_starts, window)
    if on_triton:
        from dash_train.kernels.dash.triton.router_means import router_means

        return router_means(q, before, document_starts, query_starts, block, window)
    return _means(q, before, document_starts, query_starts, block, window)


def _means(
    q: Tensor,
    before: Tensor | None,
    document_starts: Tensor,
    query_starts: tuple[int, ...],
    block: int,
    window: int,
) -> Tensor:
    """The definition in plain torch; document_starts [batch or 1, seq]."""
    batch, q_len, heads, head_dim = q.shape
    pieces = len(query_starts)
    piece = q_len // pieces
    if before is None:
        before = q.new_zeros(batch, pieces, window - 1, heads, head_dim)
    # Rows of [the queries before a piece, the piece]: a block's first token stands at window - 1 + a multiple of block.
    rows = torch.cat([before, q.unflatten(1, (pieces, piece))], 2).to(compute_dtype(q.dtype))
    first = torch.arange(0, piece, block, device=q.device)
    position = torch.tensor(query_starts, device=q.device)[:, None] + first  # [pieces, blocks]
    start = document_starts[:, position]  # [batch or 1, pieces, blocks]
    in_window = (position - start + 1).clamp(max=window)[..., None, None]  # [batch or 1, pieces, blocks, 1, 1]
    total = torch.zeros((), device=q.device)
    for back in range(window):
        total = total + rows[:, :, window - 1 - back + first].masked_fill(back >= in_window, 0)
    return (total / in_window).to(q.dtype).flatten(1, 2)


def _from_other_pieces(q: Tensor, query_starts: tuple[int, ...], window: int) -> Tensor:
    """`before`, taken from the pieces that hold it; zeros for positions before the row's first."""
    piece = q.shape[1] // len(query_starts)
    places = []
    for start in query_starts:
        for position in range(start - window + 1, start):
            holders = [i for i, first in enumerate(query_starts) if first <= position < first + piece]
            if position >= 0 and not holders:
                raise ValueError(
                    f"before is None, expected the {window - 1} queries before the piece at position {start} of "
                    "query_starts, to which its first window reaches"
                )
            places.append(holders[0] * piece + position - query_starts[holders[0]] if holders else -1)
    place = torch.tensor(places, dtype=torch.long, device=q.device)
    found = q[:, place.clamp(min=0)].masked_fill((place < 0)[:, None, None], 0)
    return found.unflatten(1, (len(query_starts), window - 1))
