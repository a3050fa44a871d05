"""Rows as transformers' collators give them, padded anywhere and packed, arranged as the blocks take them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows as the blocks take them: padding at their end, every document from a chunk's border on."""

    hidden: Tensor  # [batch, width, hidden_size]
    positions: Tensor  # [1 or batch, width], in their documents
    real: Tensor | None  # [batch, width] bool, None where all are
    document_starts: Tensor | None  # [batch, width] int32, None where every row is one document
    back: Tensor | None  # [batch, seq]: where the tokens that came in stand, None where they stand as they came

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, width, hidden_size]` in the order of the tokens that came in.

        Padding gets those of its row's last token: from the last column a generation goes on, on whichever side the
        padding is.
        """
        return hidden if self.back is None else hidden.gather(1, wide(self.back, hidden))


def arrange_rows(
    hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, chunk_size: int, *, packed: bool = True
) -> Rows:
    """Rows `[batch, seq, hidden_size]` as the blocks take them.

    Dash chunks and positions count a document's own tokens, so that it gives the same on either side of its padding,
    without it, and packed with others: a document begins wherever `position_ids` `[1 or batch, seq]` is 0.

    Raises:
        ValueError: the mask is not `[batch, seq]`, the positions do not count a document's tokens from 0, or there are
            several documents in a row where `packed` is False.
    """
    batch, seq, _ = hidden.shape
    index = torch.arange(seq, device=hidden.device)[None]
    real = order = back = None
    if attention_mask is not None:
        check_mask(attention_mask, batch, seq)
        real = attention_mask.bool()
        order = real.int().argsort(dim=1, descending=True, stable=True)
        last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
        back = torch.where(real, order.argsort(dim=1), last)
        hidden, real = hidden.gather(1, wide(order, hidden)), real.gather(1, order)
    if position_ids is None:
        return Rows(hidden, index, real, None, back)
    positions = position_ids.expand(batch, seq)
    if order is not None:
        positions = positions.gather(1, order)
    counted = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    begins = (positions == 0) & (index > 0) & counted
    starts = torch.where(begins, index, 0).cummax(1).values
    if ((positions != index - starts) & counted).any():
        raise ValueError("position_ids: expected every document's tokens counted from 0, one by one")
    if not begins.any():
        return Rows(hidden, index, real, None, back)
    if not packed:
        raise ValueError("position_ids begin anew within a row: a cache holds one document a row")
    return _spread(hidden, real, begins, starts, back, chunk_size)


def _spread(
    hidden: Tensor, real: Tensor | None, begins: Tensor, starts: Tensor, back: Tensor | None, chunk_size: int
) -> Rows:
    """Documents that begin at `starts` `[batch, seq]` moved apart, each to the border of a chunk."""
    batch, seq, _ = hidden.shape
    index = torch.arange(seq, device=hidden.device).expand(batch, seq)
    gaps = torch.where(begins, -(index - starts.roll(1, 1)) % chunk_size, 0)
    moved = gaps.cumsum(1)
    places = index + moved
    width = int(places.max()) + 1

    def place(values: Tensor) -> Tensor:
        where = wide(places, values) if values.dim() == 3 else places
        return values.new_zeros(batch, width, *values.shape[2:]).scatter(1, where, values)

    document_starts = place(starts + moved).cummax(1).values  # a gap belongs to the document before it
    positions = torch.arange(width, device=hidden.device) - document_starts
    real = place(torch.ones_like(begins) if real is None else real)
    back = places if back is None else places.gather(1, back)
    return Rows(place(hidden), positions, real, document_starts.int(), back)


def wide(places: Tensor, hidden: Tensor) -> Tensor:
    """Places `[batch, seq]` for the gathering of hidden states `[batch, any, hidden_size]`."""
    return places[..., None].expand(-1, -1, hidden.shape[-1])


def document_positions(
    seq: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    borders: tuple[Tensor | None, ...],
    device: torch.device,
) -> Tensor | None:
    """`position_ids` `[1 or batch, seq]` by all that a collator says of packed documents; None where it says nothing.

    Raises:
        ValueError: one contradicts the other, or borders are not those of a single row.
    """
    index = torch.arange(seq, device=device)
    ways = [] if position_ids is None else [position_ids]
    if seq_idx is not None:
        begins = seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0
        ways.append(index - torch.where(begins, index, 0).cummax(1).values)
    for starts in borders:
        if starts is not None:
            if starts[0] != 0 or starts[-1] != seq:
                raise ValueError(f"cu_seq_lens: expected the borders of one row, from 0 to its {seq} tokens")
            ways.append((index - starts[torch.searchsorted(starts, index, right=True, out_int32=True) - 1])[None])
    if any((way != ways[0]).any() for way in ways[1:]):
        raise ValueError("position_ids, seq_idx and cu_seq_lens: they place documents differently")
    return ways[0] if ways else None


def check_mask(mask: Tensor, batch: int, seq: int) -> None:
    if mask.shape != (batch, seq):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected {[batch, seq]}: 0 at padding, else 1")
