"""What a rank updates of each parameter, by name: fp32 weights and the optimizer's moments, on every ZeRO stage.

ZeRO flattens parameters and cuts them over the ranks, in another way on each stage. A `Piece` says which elements of
which parameter this rank updates, so that a checkpoint can hold them by name and any number of ranks, on any stage, can
take up what others wrote.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WEIGHT, STEP = "weight", "step"


@dataclass(frozen=True)
class Piece:
    """Elements `start`, `start` + 1, ... of a flattened parameter, which this rank updates in fp32."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    size: int
    owner: Tensor
    """The tensor that the optimizer updates; it holds the piece from `begin` on."""
    begin: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece in a tensor that is laid out as its owner: a view `[size]`."""
        return flat.detach().view(-1).narrow(0, self.begin, self.size)


def pieces(engine: Any) -> list[Piece]:
    """What this rank updates, in the order of the model's parameters; on stage 0 that is everything."""
    find = {0: _whole, 3: _partition}.get(engine.zero_optimization_stage(), _fragment)
    found = (find(engine.optimizer, name, parameter) for name, parameter in engine.module.named_parameters())
    return [piece for piece in found if piece is not None and piece.size > 0]


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer, out of DeepSpeed's."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def tensors_of(engine: Any, piece: Piece) -> dict[str, Tensor]:
    """The weight and the moments of a piece by kind, fp32 views `[size]`; moments once a step has been taken."""
    state = inner_optimizer(engine).state.get(piece.owner, {})
    kept = {kind: tensor for kind, tensor in state.items() if torch.is_tensor(tensor) and tensor.dim() > 0}
    return {WEIGHT: piece.of(piece.owner), **{kind: piece.of(tensor) for kind, tensor in kept.items()}}


def steps_taken(engine: Any) -> int:
    """The optimizer's own count of its steps, which the correction of its moments' bias needs."""
    states = inner_optimizer(engine).state.values()
    return max((int(state[STEP]) for state in states if STEP in state), default=0)


@torch.no_grad()
def restore(engine: Any, read: Callable[[Piece, str], Tensor | None], kinds: tuple[str, ...], steps: int) -> None:
    """Put weights and moments into an engine. Every rank calls it.

    Args:
        read: gives a piece of a kind, fp32 `[size]`; None leaves a weight as it is and a moment at zero.
        kinds: `weight` and the names of moments (`exp_avg`, ...) to put in.
        steps: the optimizer's count of steps; only where there are moments.
    """
    optimizer, partitioned = inner_optimizer(engine), engine.zero_optimization_stage() == 3
    if partitioned:
        engine.optimizer.checkpoint_event_prologue()
    for piece in pieces(engine):
        for kind in kinds:
            values = read(piece, kind)
            if values is None:
                continue
            if kind == WEIGHT:
                piece.of(piece.owner).copy_(values)
                continue
            state = optimizer.state[piece.owner]
            if kind not in state:
                state[kind] = torch.zeros_like(piece.owner, requires_grad=False)
            piece.of(state[kind]).copy_(values)
    for owner, state in optimizer.state.items():
        if steps and "exp_avg" in state:
            state[STEP] = torch.tensor(float(steps), dtype=torch.float32, device=owner.device)
    if partitioned:
        _refresh_partitions(engine.optimizer)
    elif engine.zero_optimization_stage():
        engine.optimizer.update_lp_params()


def _refresh_partitions(optimizer: Any) -> None:
    """Stage 3: the weights in the precision of training from the fp32 ones, and those that are kept whole."""
    for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[group].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def _whole(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter) -> Piece:
    return Piece(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)


def _fragment(optimizer: Any, name: str, parameter: nn.Parameter) -> Piece | None:
    """Stages 1 and 2: the parameters of a group are laid end to end, and cut into one part a rank."""
    place = parameter._hp_mapping  # type: ignore[attr-defined]
    if place is None:
        return None
    owner = optimizer.optimizer.param_groups[place.param_group_index]["params"][0]
    start, address = place.lp_fragment_address.start, place.hp_fragment_address
    return Piece(name, tuple(parameter.shape), start, address.numel, owner, address.start)


def _partition(optimizer: Any, name: str, parameter: Any) -> Piece:
    """Stage 3: every parameter is cut into one part a rank, the last one padded."""
    group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = length * dist.get_rank()
    size = max(0, min(length, parameter.ds_numel - start))
    return Piece(name, tuple(parameter.ds_shape), start, size, optimizer.fp32_partitioned_groups_flat[group], begin)
