"""Run a function on several ranks of this machine, in processes of their own."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from dash_train.distributed.world import free_port, init_world


def run_on_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` on every rank, gloo initialised; an error of any of them is raised here."""
    mp.start_processes(_rank, (ranks, free_port(), function, arguments), nprocs=ranks, start_method="spawn")


def _rank(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    init_world()
    function(rank, *arguments)
