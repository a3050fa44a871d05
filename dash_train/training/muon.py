"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon) for weight matrices, AdamW for the rest, on every ZeRO stage.

The momentum of a matrix is made orthogonal, and scaled so that an update is as large as AdamW's (0.2 root mean square;
arXiv 2502.16982): learning rate and weight decay serve both. ZeRO cuts matrices over the ranks; those that are cut are
put together by a sum over the ranks, each rank makes its share of them orthogonal, and a second sum hands the results
out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_train.distributed.world import gather_objects
from dash_train.training.model_state import Piece, pieces

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at 0 is steepest (Jordan)
ITERATIONS = 5
UPDATE_RMS = 0.2
AT_ONCE = 2**27  # elements of cut matrices that are exchanged together


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` are updated by Muon instead; other keys of a group mean the same.

    On stages 1 to 3 `attach` must be called once DeepSpeed has wrapped it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **options: Any) -> None:
        super().__init__(groups, **options)
        for group in self.param_groups:
            group.setdefault("momentum", momentum)
        self._cut: _CutMatrices | None = None

    def attach(self, engine: Any) -> None:
        """Learn which rank holds which part of each matrix. Every rank calls it."""
        self._cut = _CutMatrices(engine)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure) if self.param_groups else None
        finally:
            self.param_groups = groups
        for group in groups:
            for owner in group["params"] if group["muon"] else ():
                if owner.grad is not None:
                    self._update(owner, owner.grad, group)
        return loss

    def _update(self, owner: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[owner]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(owner)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov
        update = self._cut.orthogonal(owner, update) if self._cut else orthogonal(update)
        owner.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix `[rows, columns]` with all singular values near 1, by Newton-Schulz iterations in bf16, then scaled."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x.to(matrix.dtype) * (UPDATE_RMS * math.sqrt(max(matrix.shape)))


@dataclass(frozen=True)
class _Matrix:
    name: str
    shape: tuple[int, ...]
    whole: bool
    """One rank holds all of it."""
    mine: Piece | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _CutMatrices:
    """The matrices in each tensor that an optimizer updates, whoever holds them: the same list on every rank."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        if engine.zero_optimization_stage() == 3:
            owners = list(optimizer.fp32_partitioned_groups_flat)
        else:
            owners = [group["params"][0] for group in optimizer.optimizer.param_groups]
        numbers = {id(owner): number for number, owner in enumerate(owners)}
        mine = {piece.name: piece for piece in pieces(engine)}
        held = [(piece.name, piece.shape, numbers[id(piece.owner)], piece.size) for piece in mine.values()]
        order = {name: place for place, (name, _) in enumerate(engine.module.named_parameters())}
        sizes: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
        for part in gather_objects(held):
            for name, shape, number, size in part:
                sizes.setdefault((name, tuple(shape), number), []).append(size)
        self._of: dict[int, list[_Matrix]] = {id(owner): [] for owner in owners}
        for name, shape, number in sorted(sizes, key=lambda key: order[key[0]]):
            whole = len(sizes[name, shape, number]) == 1
            self._of[id(owners[number])].append(_Matrix(name, shape, whole, mine.get(name)))

    def orthogonal(self, owner: Tensor, update: Tensor) -> Tensor:
        """The update of an owner's matrices, each made orthogonal; laid out as the owner. Every rank calls it."""
        made = torch.zeros_like(update)
        cut = []
        for matrix in self._of[id(owner)]:
            if not matrix.whole:
                cut.append(matrix)
            elif matrix.mine is not None:
                matrix.mine.of(made).copy_(orthogonal(matrix.mine.of(update).view(matrix.shape)).reshape(-1))
        for together in _batches(cut):
            self._exchange(together, update, made)
        return made

    def _exchange(self, matrices: list[_Matrix], update: Tensor, made: Tensor) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        buffer = update.new_zeros(sum(matrix.size for matrix in matrices))
        parts = list(buffer.split([matrix.size for matrix in matrices]))
        for matrix, part in zip(matrices, parts, strict=True):
            if matrix.mine is not None:
                part.narrow(0, matrix.mine.start, matrix.mine.size).copy_(matrix.mine.of(update))
        dist.all_reduce(buffer)  # one rank has each element, the others zero
        for number, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
            if number % ranks == rank:
                part.copy_(orthogonal(part.view(matrix.shape)).reshape(-1))
            else:
                part.zero_()
        dist.all_reduce(buffer)
        for matrix, part in zip(matrices, parts, strict=True):
            if matrix.mine is not None:
                matrix.mine.of(made).copy_(part.narrow(0, matrix.mine.start, matrix.mine.size))


def _batches(matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices in groups of about `AT_ONCE` elements."""
    together: list[_Matrix] = []
    for matrix in matrices:
        if together and sum(other.size for other in together) + matrix.size > AT_ONCE:
            yield together
            together = []
        together.append(matrix)
    if together:
        yield together
