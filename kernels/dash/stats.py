"""What one call of dash_attention routed: thresholds, sizes of the routed sets, and two ratios that decide speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def tile_tokens(group: int) -> int:
    """T: how many consecutive query tokens share a tile of the union factor, for `group` query heads per KV head."""
    return max(1, 64 // group)


def count_eligible(document_starts: Tensor, query_starts: tuple[int, ...], q_len: int, chunk_size: int) -> Tensor:
    """How many chunks lie between a token's document's first and its own: int32 [batch or 1, q_len].

    document_starts [batch or 1, seq]; the queries are equal pieces, the i-th from position query_starts[i] on.
    """
    piece = q_len // len(query_starts)
    pieces = [
        torch.arange(start, start + piece, device=document_starts.device) // chunk_size
        - document_starts[:, start : start + piece] // chunk_size
        for start in query_starts
    ]
    return torch.cat(pieces, -1).int()


class RoutingCounts(NamedTuple):
    """The part of DashStats that RoutingTotals are made of, without the tensors that `support` keeps alive."""

    active_chunks: Tensor  # [batch, kv_heads, blocks] int32: |R(t)| of each routing block's tokens
    union_chunks: Tensor | None  # [batch, kv_heads, tiles] int32; None where tiles lie in blocks: what those route to
    residual: Tensor  # scalar: worst |sum p - 1| over the rows with an eligible chunk
    tile: int  # T: tokens of a tile
    block: int  # tokens of a routing block
    tokens: int  # q_len

    def active_by_token(self) -> Tensor:
        """|R(t)| int32 [batch, kv_heads, q_len]."""
        return by_token(self.active_chunks, self.block, self.tokens)

    def union_by_tile(self, pieces: int) -> Tensor:
        """|union of R(t)| int32 [batch, kv_heads, tiles] of tiles that begin anew with each of the query pieces."""
        if self.union_chunks is not None:
            return self.union_chunks
        tiles = pieces * -(-(self.tokens // pieces) // self.tile)
        return by_token(self.active_chunks, self.block // self.tile, tiles)


def by_token(per_block: Tensor, block: int, tokens: int, dim: int = -1) -> Tensor:
    """What belongs to a routing block, given to each of its tokens, of which there are `tokens` in all."""
    return per_block if block == 1 else per_block.repeat_interleave(block, dim).narrow(dim, 0, tokens)


class RoutingTotals(NamedTuple):
    """Sums over real tokens, float64 on the device, to be added up over micro-batches: of one layer scalars, of
    several [layers].

    density = active / eligible; union factor = union / tiled_active. `residual` is a maximum, not a sum.
    """

    active: Tensor  # sum of |R(t)| over tokens and KV heads
    eligible: Tensor  # sum of the eligible chunks over tokens and KV heads
    union: Tensor  # T * sum of |union of R(t)| over the tiles of T real tokens
    tiled_active: Tensor  # sum of |R(t)| over those tiles
    residual: Tensor  # worst |sum p - 1|


def routing_totals(
    layers: Sequence[RoutingCounts], eligible_chunks: Tensor, real: Tensor | None, pieces: int
) -> RoutingTotals:
    """The totals [layers] of layers that attended over the same rows, in a handful of launches for all of them.

    eligible_chunks [batch or 1, q_len] of count_eligible; real bool [batch, q_len], default all; pieces as in
    DashStats.
    """
    tile = layers[0].tile
    active = torch.stack([layer.active_by_token() for layer in layers])
    _, batch, kv_heads, q_len = active.shape
    if real is None:
        real = torch.ones(batch, q_len, dtype=torch.bool, device=active.device)
    active = active * real[:, None]
    tile_active = _tiles(active, tile, pieces).sum(-1)
    tile_is_real = _tiles(real[:, None], tile, pieces).all(-1)
    union = torch.stack([layer.union_by_tile(pieces) for layer in layers])
    return RoutingTotals(
        active=active.sum((1, 2, 3)).double(),
        eligible=((eligible_chunks * real).sum().double() * kv_heads).expand(len(layers)),
        union=(union * tile_is_real).sum((1, 2, 3)).double() * tile,
        tiled_active=(tile_active * tile_is_real).sum((1, 2, 3)).double(),
        residual=torch.stack([layer.residual for layer in layers]).double(),
    )


def _tiles(per_token: Tensor, tile: int, pieces: int) -> Tensor:
    """[..., q_len] -> [..., tiles, tile], each piece filled up with zeros."""
    by_piece = per_token.unflatten(-1, (pieces, -1))
    filled = F.pad(by_piece, (0, -by_piece.shape[-1] % tile))
    return filled.flatten(-2).unflatten(-1, (-1, tile))


@dataclass(frozen=True)
class DashStats:
    """Statistics of one dash_attention call. All tensors are detached; reading them makes the host wait, nothing else.

    tau and row_max are in units of z = routing_scale * q.ktilde / (2 sqrt(head_dim)), half the routing score:
    chunk c is in a head's support when z_c - row_max > tau. Where a token has no eligible chunk row_max is 0 and tau
    means nothing. `support()` recomputes the routing from tensors it keeps alive: let go of the object soon.
    """

    block_tau: Tensor  # [batch, heads, blocks], of each routing block
    block_row_max: Tensor  # [batch, heads, blocks]
    block_normalizer: Tensor  # [batch, kv_heads, blocks]
    counts: RoutingCounts
    pieces: int  # query pieces; tiles begin anew with each
    count_eligible: Callable[[], Tensor]  # -> eligible_chunks, which take several launches
    support: Callable[[], Tensor]  # -> bool [batch, heads, q_len, chunks]: r > 0, chunks = ceil(seq / chunk_size)

    @property
    def eligible_chunks(self) -> Tensor:
        """int32 [batch, q_len]: the chunks that a token chooses from."""
        return self.count_eligible().expand(self.active_chunks.shape[0], -1)

    @property
    def tau(self) -> Tensor:
        """[batch, heads, q_len], relative to row_max."""
        return by_token(self.block_tau, self.counts.block, self.counts.tokens)

    @property
    def row_max(self) -> Tensor:
        """[batch, heads, q_len], of z."""
        return by_token(self.block_row_max, self.counts.block, self.counts.tokens)

    @property
    def normalizer(self) -> Tensor:
        """[batch, kv_heads, q_len]: the mean or maximum of log pbar over R(t); 0 for "none"."""
        return by_token(self.block_normalizer, self.counts.block, self.counts.tokens)

    @property
    def active_chunks(self) -> Tensor:
        """[batch, kv_heads, q_len] int32: |R(t)|, the own chunk not counted."""
        return self.counts.active_by_token()

    @property
    def union_chunks(self) -> Tensor:
        """[batch, kv_heads, tiles] int32: |union of R(t)| over T consecutive query tokens of a piece."""
        return self.counts.union_by_tile(self.pieces)

    @property
    def residual(self) -> Tensor:
        """Scalar: worst |sum p - 1| over the rows with an eligible chunk."""
        return self.counts.residual

    @property
    def tile(self) -> int:
        """T."""
        return self.counts.tile

    @property
    def density(self) -> Tensor:
        """Routed over eligible (token, chunk) pairs: a float64 scalar; 0 where nothing is eligible."""
        eligible = self.eligible_chunks.sum() * self.active_chunks.shape[1]
        return self.active_chunks.sum().double() / eligible.clamp(min=1)

    @property
    def union_factor(self) -> Tensor:
        """How much more a tile of T tokens reads than its tokens routed to: a float64 scalar, from 1 to T."""
        return self.tile * self.union_chunks.sum().double() / self.active_chunks.sum().clamp(min=1)

    def summary(self, real: Tensor | None = None) -> RoutingTotals:
        """Sums over the tokens that `real` (bool [batch, q_len]; default all) marks: pads count in no statistic."""
        totals = routing_totals([self.counts], self.eligible_chunks, real, self.pieces)
        return RoutingTotals(*(total[0] for total in totals))
