"""A run folder belongs to one run at a time, and all its ranks see the same one."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dash_train.distributed.world import World, from_main, gather_objects
from dash_train.errors import UserError

LOCK = "lock"
SEEN_WITHIN_SECONDS = 10.0  # network file systems show a new file late

_held: dict[Path, int] = {}  # descriptors of this process' locks: closing any descriptor of a file gives its lock up


def claim(run_dir: Path, world: World) -> None:
    """Lock a run folder for this run and see that every rank has the same one. The lock ends with the process.

    Raises:
        UserError: on every rank: another process holds it, or a rank has another folder of that name.
    """
    token = from_main(world, lambda: _lock(run_dir))
    seen = gather_objects((socket.gethostname(), world.is_main or _sees(run_dir, token)))
    for rank, (host, sees) in enumerate(seen):
        if not sees:
            raise UserError(
                f"run_dir: {run_dir.absolute()} is another folder on rank {rank} (on {host}) than on rank 0 (on "
                f"{seen[0][0]}); every rank writes a part of a checkpoint: name a folder on a shared file system"
            )


def release(run_dir: Path) -> None:
    """Give a lock up before the process ends; without one, nothing happens."""
    descriptor = _held.pop(run_dir.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def nothing_left_of_a_refusal(run_dir: Path, world: World) -> Iterator[None]:
    """A run that is refused before it has begun leaves no new folder behind."""
    was_there = run_dir.exists()
    try:
        yield
    except (UserError, OSError):
        release(run_dir)
        if world.is_main and not was_there:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def _lock(run_dir: Path) -> str:
    """A POSIX lock: the kernel ends it with the process, however that ends, on network file systems, too."""
    release(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 4096)
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"run_dir: {run_dir} is in use by {_describe(holder)}: two runs in one folder would mix their checkpoints; "
            "stop that one, choose another run_dir, or start all ranks of one run by a launcher (deepspeed, torchrun, "
            "srun)"
        ) from error
    token = uuid.uuid4().hex
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "token": token}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    os.fsync(descriptor)
    _held[run_dir.absolute()] = descriptor
    return token


def _describe(holder: bytes) -> str:
    try:
        facts = json.loads(holder)
        minutes = (time.time() - facts["since"]) / 60
        return f"process {facts['pid']} on {facts['host']}, for {minutes:.0f} min"
    except (ValueError, KeyError, TypeError):  # it has just been made
        return "another process"


def _sees(run_dir: Path, token: str) -> bool:
    give_up = time.monotonic() + SEEN_WITHIN_SECONDS
    while time.monotonic() < give_up:
        try:
            if token in (run_dir / LOCK).read_text():
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False
