"""Context parallelism: several ranks share every row, each with an equal part of its tokens.

Everything but attention looks at one token at a time and works on the rank's share alone. A row is cut into 2n pieces
of whole chunks and rank r holds pieces r and 2n - 1 - r, so that early tokens, which see few others, and late ones are
spread evenly. What attention needs from the other ranks comes in one of two ways:

- `gather`: the rank's queries attend to the keys and values of whole rows, which every rank gathers (few, under
  grouped-query attention); chunk summaries are made anew from the gathered keys, which costs less than sending them.
  Of queries it needs the last few before each of its pieces, to which the window of a routing block reaches.
  Their gradients go back to the rank they came from and are added up there, in fp32.
- `ulysses`: the rank attends with whole rows of some of the KV heads and their queries (arXiv 2309.14509).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """This rank among those that share its rows; by default it has them to itself."""

    rank: int = 0
    size: int = 1
    method: Literal["gather", "ulysses"] = "gather"
    group: Any = None  # their torch.distributed.ProcessGroup

    def share(self, rows: Tensor) -> Tensor:
        """This rank's tokens, `[batch, seq / size, ...]`, of whole rows `[batch, seq, ...]`."""
        if self.size == 1:
            return rows
        pieces = rows.unflatten(1, (2 * self.size, -1))
        return torch.cat([pieces[:, self.rank], pieces[:, -1 - self.rank]], dim=1)

    def query_starts(self, seq: int) -> tuple[int, ...]:
        """Where in a row of `seq` tokens the pieces begin whose queries attend on this rank."""
        if self.size == 1 or self.method == "ulysses":
            return (0,)
        piece = seq // (2 * self.size)
        return (self.rank * piece, (2 * self.size - 1 - self.rank) * piece)

    def at_queries(self, rows: Tensor) -> Tensor:
        """What whole rows `[batch, seq]` hold at the queries that attend on this rank."""
        return rows if self.method == "ulysses" else self.share(rows)

    def own_heads(self, per_kv_head: Tensor) -> Tensor:
        """The KV heads of a tensor `[kv_heads, ...]` that attend on this rank."""
        return per_kv_head if self.method == "gather" else per_kv_head.chunk(self.size)[self.rank]

    def add_up(self, counts: Tensor) -> Tensor:
        """The sum over the ranks that share the rows, in place."""
        if self.size > 1:
            dist.all_reduce(counts, group=self.group)
        return counts

    def send_keys(self, share: Tensor) -> "Sent":
        """Keys or values `[batch, seq / size, kv_heads, head_dim]` of this rank's tokens, to where they are needed.

        The result's `receive` gives those of whole rows, of all heads (`gather`) or of this rank's (`ulysses`).
        """
        if self.size == 1:
            return Sent(share)
        pieces = share.unflatten(1, (2, -1)).movedim(1, 0)  # [2, batch, piece, kv_heads, head_dim]
        if self.method == "gather":
            return Sent(pieces, Gather(self.group, self.size))
        return Sent(pieces.unflatten(3, (self.size, -1)).movedim(3, 0), AllToAll(self.group, self.size))

    def send_queries(self, share: Tensor) -> "Sent":
        """Queries `[batch, seq / size, heads, head_dim]` of this rank's tokens, to where they attend."""
        return Sent(share) if self.method == "gather" else self.send_keys(share)

    def queries_before(self, q: Tensor, count: int) -> Tensor | None:
        """The `count` queries before each of this rank's pieces, `[batch, 2, count, heads, head_dim]`; those of a row's
        first piece are any. None where the pieces before are on this rank.

        q `[batch, seq / size, heads, head_dim]`, of pieces that have so many tokens. The last queries of every piece go
        to every rank, which are few beside the keys.
        """
        if self.size == 1 or self.method == "ulysses" or not count:
            return None
        last = q.unflatten(1, (2, -1))[:, :, -count:].movedim(1, 0)
        pieces = Sent(last, Gather(self.group, self.size)).receive().unflatten(1, (2 * self.size, -1))
        return torch.stack([pieces[:, self.rank - 1], pieces[:, -2 - self.rank]], dim=1)

    def return_outputs(self, out: Tensor) -> Tensor:
        """Attention's output for this rank's tokens, `[batch, seq / size, heads, head_dim]`, from where they attend."""
        if self.size == 1 or self.method == "gather":
            return out
        pieces = out.unflatten(1, (2 * self.size, -1)).unbind(1)
        by_rank = torch.stack([pieces[piece] for piece in _pieces_by_rank(self.size)]).unflatten(0, (self.size, 2))
        transfer = AllToAll(self.group, self.size)
        heads_by_rank = transfer.finish(transfer.start(by_rank))  # [size, 2, batch, piece, heads / size, head_dim]
        return heads_by_rank.movedim(0, 3).flatten(3, 4).movedim(0, 1).flatten(1, 2)


WHOLE_ROWS = Context()


class Sent:
    """A tensor on its way: work done before `receive` hides the transfer."""

    def __init__(self, outgoing: Tensor, transfer: "Gather | AllToAll | None" = None) -> None:
        self.transfer = transfer
        self.tensor = transfer.start(outgoing) if transfer else outgoing

    def receive(self) -> Tensor:
        """`[batch, seq, ...]`: the pieces of all ranks, put into the order of the row."""
        if self.transfer is None:
            return self.tensor
        pieces = self.transfer.finish(self.tensor).flatten(0, 1).unbind(0)  # rank 0's first and last, rank 1's, ...
        order = _pieces_by_rank(self.transfer.size)
        return torch.cat([pieces[order.index(piece)] for piece in range(len(order))], dim=1)


def _pieces_by_rank(size: int) -> list[int]:
    """The pieces that the ranks hold, two each."""
    return [piece for rank in range(size) for piece in (rank, 2 * size - 1 - rank)]


class AllToAll:
    """`outgoing[i]` goes to rank i of the group, `incoming[i]` came from it.

    A differentiable collective in two halves. The backward's runs from the second half to the first, so that what was
    computed between them in the forward hides both.
    """

    def __init__(self, group: Any, size: int) -> None:
        self.group, self.size = group, size
        self.work: Any = None

    def start(self, outgoing: Tensor) -> Tensor:
        """Begin to send `[size, ...]`; returns the same shape, still empty."""
        return _Start.apply(outgoing, self)

    def finish(self, incoming: Tensor) -> Tensor:
        """Wait for what `start` returned."""
        return _Finish.apply(incoming, self)

    def launch(self, outgoing: Tensor) -> Tensor:
        incoming = torch.empty_like(outgoing, memory_format=torch.contiguous_format)
        self.work = dist.all_to_all_single(incoming, outgoing.contiguous(), group=self.group, async_op=True)
        return incoming

    def wait(self) -> None:
        self.work.wait()
        self.work = None

    def forward(self, outgoing: Tensor) -> Tensor:
        return self.launch(outgoing)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient


class Gather(AllToAll):
    """Sends a tensor to every rank; its gradient is the sum of those that come back.

    They are sent as they are (bf16, as the kernels give them) and added up by the receiver, in fp32 and rounded once:
    the bytes of a reduce-scatter in bf16 with the accuracy of one in fp32.
    """

    def forward(self, outgoing: Tensor) -> Tensor:
        incoming = outgoing.new_empty(self.size, *outgoing.shape)
        self.work = dist.all_gather_into_tensor(
            incoming.flatten(0, 1), outgoing.contiguous(), group=self.group, async_op=True
        )
        return incoming

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient.sum(0)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outgoing: Tensor, transfer: AllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.forward(outgoing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.wait()
        return ctx.transfer.backward(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, incoming: Tensor, transfer: AllToAll) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return incoming.view_as(incoming)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.launch(gradient), None
