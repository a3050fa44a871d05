"""A run on several ranks that is killed again and again: a program, `killed_runs.py RECIPE RANKS KILLS SEED`.

What takes long is imported once; the ranks of every attempt are forked from here. Half of the kills come at a random
moment, half while a checkpoint is being written; one rank is killed, and the others as a launcher would do it, or all.
"""

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401
import torch

from dash_train.recipe.load import load_recipe
from dash_train.training.trainer import Trainer

LONGEST = 120.0  # seconds of an attempt


def start(recipe: Path, ranks: int) -> list[int]:
    """Fork the ranks of an attempt; returns their processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(ranks):
        if child := os.fork():
            processes.append(child)
            continue
        code = 1
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
            Trainer(load_recipe(recipe)).train()
            torch.distributed.barrier()
            code = 0
        finally:
            os._exit(code)
    return processes


def poll(processes: list[int], codes: dict[int, int]) -> bool:
    """Collect who has ended; whether all have."""
    for process in processes:
        if process not in codes and (found := os.waitpid(process, os.WNOHANG))[0]:
            codes[process] = os.waitstatus_to_exitcode(found[1])
    return len(codes) == len(processes)


def kill(processes: list[int], codes: dict[int, int], run_dir: Path, rng: random.Random, seconds: float) -> bool:
    """Kill some time or other; whether the ranks were still at work."""
    began, moment = time.monotonic(), rng.uniform(0.1, 0.9) * seconds
    saves, seen = rng.randint(1, 3), set()
    in_a_save = rng.random() < 0.5
    while not poll(processes, codes) and time.monotonic() - began < LONGEST:
        if in_a_save:
            seen |= {path.name for path in (run_dir / "checkpoints").glob(".tmp-*")}
            if len(seen) >= saves:
                time.sleep(rng.uniform(0, 0.03))
                break
        elif time.monotonic() - began > moment:
            break
        time.sleep(0.001)
    if poll(processes, codes):
        return False
    victims = [rng.choice(processes)] if rng.random() < 0.5 else processes
    for others in (victims, processes):
        for process in others:
            if process not in codes:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    while not poll(processes, codes):
        time.sleep(0.001)
    return True


def main() -> None:
    recipe, ranks, kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    run_dir, rng = Path(load_recipe(recipe).run_dir), random.Random(seed)
    done, seconds = 0, 4.0
    for _ in range(4 * kills + 4):
        began, codes = time.monotonic(), {}
        processes = start(recipe, ranks)
        if done < kills and kill(processes, codes, run_dir, rng, seconds):
            done += 1
            continue
        while not poll(processes, codes):
            time.sleep(0.005)
        seconds = time.monotonic() - began
        assert set(codes.values()) == {0}, codes
        if done >= kills:
            print(f"{done} kills")
            return
        # It came to its end before it was killed: on with the kills, from two steps before.
        for found in sorted((run_dir / "checkpoints").glob("step-*"))[1:]:
            for file in found.iterdir():
                file.unlink()
            found.rmdir()
    raise SystemExit(f"only {done} of {kills} kills")


if __name__ == "__main__":
    main()
