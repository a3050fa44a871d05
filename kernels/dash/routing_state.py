"""What a layer's router remembers from token to token of decoding: a sequence routes where a routing block begins."""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from dash_train.kernels.common.numbers import compute_dtype
from dash_train.kernels.dash.checks import check_same_kind, check_shape
from dash_train.kernels.dash.chunk_lists import ChunkLists


class RoutingState(NamedTuple):
    """Each sequence is in a block of its own. All tensors are contiguous and changed in place."""

    recent_q: Tensor  # [batch, window, heads, head_dim]: the query of position p stands at p % window
    router_q: Tensor  # [batch, heads, head_dim]: the routers' queries of the blocks
    lists: ChunkLists  # what the blocks attend to

    @classmethod
    def allocate(
        cls,
        batch: int,
        chunks: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Of empty sequences, for queries of `dtype` and a cache of so many chunks."""

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *size, dtype=dtype, device=device)

        return cls(
            recent_q=zeros(window, heads, head_dim),
            router_q=zeros(heads, head_dim),
            lists=ChunkLists(
                chunks=zeros(kv_heads, chunks, dtype=torch.int32),
                log_pbar=zeros(kv_heads, chunks, dtype=compute_dtype(dtype)),
                keys=zeros(kv_heads, dtype=torch.int32),
                normalizer=zeros(kv_heads, dtype=compute_dtype(dtype)),
            ),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, `[batch, ...]`: a sequence that takes another's place takes these rows too."""
        return self.recent_q, self.router_q, *self.lists

    def queries_before(self, start: int) -> Tensor:
        """`before` of router_queries, [batch, 1, window - 1, heads, head_dim], for prompts' tokens from `start` on."""
        window = self.recent_q.shape[1]
        return self.recent_q[:, None, [position % window for position in range(start - window + 1, start)]]

    def keep_queries(self, q: Tensor, router_q: Tensor, start: int, lengths: Tensor, routing_block: int) -> None:
        """Of a piece of prompts, what the sequences need that go on in it or end in it.

        Args:
            q: [batch, piece, heads, head_dim], at the positions from `start` on, which begins a block.
            router_q: [batch, ceil(piece / routing_block), heads, head_dim].
            lengths: [batch], of the whole prompts.
        """
        window, piece = self.recent_q.shape[1], q.shape[1]
        row = torch.arange(len(q), device=q.device)
        newest = lengths.long().clamp(max=start + piece)[:, None] - 1
        position = newest - (newest - torch.arange(window, device=q.device)) % window  # the last that a place is for
        found = q[row[:, None], (position - start).clamp(min=0)]
        self.recent_q.copy_(torch.where((position >= start)[..., None, None], found, self.recent_q))

        first = (lengths.long() - 1) // routing_block * routing_block - start
        in_piece = (first >= 0) & (first < piece)
        found = router_q[row, (first // routing_block).clamp(0, router_q.shape[1] - 1)]
        self.router_q.copy_(torch.where(in_piece[:, None, None], found, self.router_q))


def check_state(state: RoutingState | None, q: Tensor, kv_heads: int, chunks: int, routing_block: int) -> None:
    """The state fits q [batch, heads, head_dim] and a cache of so many chunks; blocks of several tokens need one."""
    if state is None:
        if routing_block > 1:
            raise ValueError(
                f"state is None, expected a RoutingState, which routing blocks of {routing_block} tokens need"
            )
        return
    batch, heads, head_dim = q.shape
    window = state.recent_q.shape[1]
    check_shape("state.recent_q", state.recent_q, batch=batch, window=window, heads=heads, head_dim=head_dim)
    check_same_kind("state.recent_q", state.recent_q, q)
    check_shape("state.router_q", state.router_q, batch=batch, heads=heads, head_dim=head_dim)
    check_shape("state.lists.chunks", state.lists.chunks, batch=batch, kv_heads=kv_heads, chunks=chunks)
