"""Every rank's log in a file of its own."""

import logging
import os
import socket
from pathlib import Path

import torch

from dash_train.distributed.world import World

logger = logging.getLogger(__name__)


def log_to_file(run_dir: Path, world: World) -> Path:
    """Keep what this rank logs in a file of its own, and say there where it runs; returns the file."""
    path = run_dir / "logs" / f"rank-{world.rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.set_name("rank log")
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == "rank log"]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    place = f"rank {world.rank} of {world.size}, process {os.getpid()} on {socket.gethostname()}, {device}"
    handler.handle(logger.makeRecord(__name__, logging.INFO, __file__, 0, place, (), None))
    return path
