"""What one call of dash_attention routed: thresholds, sizes of the routed sets, and two ratios that decide speed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def tile_tokens(group: int) -> int:
    """T: how many consecutive query tokens share a tile of the union factor, for `group` query heads per KV head."""
    return max(1, 64 // group)


class RoutingTotals(NamedTuple):
    """Sums over real tokens: float64 scalars on the device, to be added up over layers and micro-batches.

    density = active / eligible; union factor = union / tiled_active. `residual` is a maximum, not a sum.
    """

    active: Tensor  # sum of |R(t)| over tokens and KV heads
    eligible: Tensor  # sum of the eligible chunks over tokens and KV heads
    union: Tensor  # T * sum of |union of R(t)| over the tiles of T real tokens
    tiled_active: Tensor  # sum of |R(t)| over those tiles
    residual: Tensor  # worst |sum p - 1|


@dataclass(frozen=True)
class DashStats:
    """Statistics of one dash_attention call. All tensors are detached; reading them makes the host wait, nothing else.

    tau and row_max are in units of z = routing_scale * q.ktilde / (2 sqrt(head_dim)), half the routing score:
    chunk c is in a head's support when z_c - row_max > tau. Where a token has no eligible chunk row_max is 0 and tau
    means nothing. `support()` recomputes the routing from tensors it keeps alive: let go of the object soon.
    """

    tau: Tensor  # [batch, heads, q_len], relative to row_max
    row_max: Tensor  # [batch, heads, q_len]
    normalizer: Tensor  # [batch, kv_heads, q_len]: the mean or maximum of log pbar over R(t); 0 for "none"
    active_chunks: Tensor  # [batch, kv_heads, q_len] int32: |R(t)|, the own chunk not counted
    eligible_chunks: Tensor  # [batch, q_len] int32
    union_chunks: Tensor  # [batch, kv_heads, tiles] int32: |union of R(t)| over T consecutive query tokens of a piece
    residual: Tensor  # scalar: worst |sum p - 1| over the rows with an eligible chunk
    tile: int  # T
    pieces: int  # query pieces; tiles begin anew with each
    support: Callable[[], Tensor]  # -> bool [batch, heads, q_len, chunks]: r > 0, chunks = ceil(seq / chunk_size)

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
        batch, kv_heads, q_len = self.active_chunks.shape
        if real is None:
            real = torch.ones(batch, q_len, dtype=torch.bool, device=self.tau.device)
        active = self.active_chunks * real[:, None]
        tile_active = self._tiles(active).sum(-1)
        tile_is_real = self._tiles(real[:, None]).all(-1)
        return RoutingTotals(
            active=active.sum().double(),
            eligible=(self.eligible_chunks * real).sum().double() * kv_heads,
            union=(self.union_chunks * tile_is_real).sum().double() * self.tile,
            tiled_active=(tile_active * tile_is_real).sum().double(),
            residual=self.residual.double(),
        )

    def _tiles(self, per_token: Tensor) -> Tensor:
        """[..., q_len] -> [..., tiles, T], each piece filled up with zeros."""
        pieces = per_token.unflatten(-1, (self.pieces, -1))
        filled = F.pad(pieces, (0, -pieces.shape[-1] % self.tile))
        return filled.flatten(-2).unflatten(-1, (-1, self.tile))
