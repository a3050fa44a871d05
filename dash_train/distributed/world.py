"""The ranks of a run: how a process finds its place, and the few collectives that the trainer needs."""

import atexit
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dash_train.distributed.place import set_place
from dash_train.errors import UserError
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.recipe.schema import ParallelConfig

T = TypeVar("T")

# Long enough for rank 0 to tokenize a large corpus while the others wait.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
# How long the ranks wait for the last of them to start.
START_TIMEOUT = timedelta(minutes=10)
SLOW_START = 20.0  # seconds after which it is said that they wait

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world() -> World:
    """Join the process group. Without a launcher the process is a world of its own.

    NCCL on CUDA, gloo elsewhere.

    Raises:
        UserError: the launcher's variables are wrong, or the ranks do not find each other.
    """
    set_place()
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its C++ shared-memory collectives are compiled for a minute at first use and need a compiler; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _meet("nccl" if cuda else "gloo")
        deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _meet(backend: str) -> None:
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    ranks = os.environ["WORLD_SIZE"]
    slow = threading.Timer(SLOW_START, logger.warning, ("waiting at %s until all %s ranks have started", place, ranks))
    slow.daemon = True
    slow.start()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{place}: the {ranks} ranks did not meet there ({reason}); start all of them, on a port that is free "
            "(deepspeed --master_port, torchrun --master-port)"
        ) from error
    finally:
        slow.cancel()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def join_context(world: World, parallel: ParallelConfig) -> Context:
    """The group of this rank and the others that share its rows: `parallel.context` consecutive ranks.

    Raises:
        UserError: the ranks do not divide into such groups.
    """
    size = parallel.context
    if world.size % size:
        raise UserError(
            f"parallel.context: {size} ranks share a row, but the run has {world.size}, not a multiple of it"
        )
    if size == 1:
        return WHOLE_ROWS
    group, _ = dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)
    return Context(world.rank % size, size, parallel.context_method, group)


def shorten_timeouts(seconds: float) -> None:
    """Let every collective from now on, in any group of this rank, give up after so many seconds."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest of each of `values` over the ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(world: World, make: Callable[[], T]) -> T:
    """What `make` returns on the main rank, on every rank; a mistake that it meets is raised on every rank."""
    if world.size == 1:
        return make()
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = make()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=world.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_a_collective(error: BaseException) -> bool:
    """Has another rank gone? Gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)
