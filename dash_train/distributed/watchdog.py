"""Which rank does a hung step wait for?

Every rank counts the phases it enters (loading data, forward, ...) and posts the count, once a second and from a thread
of its own, to the store through which the ranks found each other. All ranks go through the same phases, so whoever
has entered the fewest is the one that the others wait for, and whoever no longer posts is dead or stopped.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist
from typing_extensions import Self

from dash_train.distributed.world import World, from_a_collective, shorten_timeouts
from dash_train.errors import EXIT_RANK_LOST, RankError

BEAT_SECONDS = 1.0
GRACE_SECONDS = 30.0  # collectives give up so much later, should a watchdog be unable to act

WAY_OUT = "run the same command to resume from the last checkpoint"


@dataclass(frozen=True)
class Post:
    """What a rank tells the others of where it is."""

    process: str
    """Process id and host."""
    beat: int
    """Grows as long as the process lives."""
    phases: int
    """Phases entered so far."""
    place: str
    """Step and phase, in words."""


class Phase(NamedTuple):
    number: int
    place: str
    since: float  # time.monotonic()


class Watchdog:
    """Watches this rank while it trains (as a context manager), and has an account of all.

    A phase that takes longer than `timeout_seconds` once the first step is done ends the process; a collective that
    fails, as when another rank has died, becomes a RankError. Both name the rank that is to blame.
    """

    def __init__(self, world: World, timeout_seconds: float, log: Path) -> None:
        self.world, self.timeout_seconds, self.log = world, timeout_seconds, log
        self.armed = False
        self._phase = Phase(0, "the start", time.monotonic())
        self._closed = threading.Event()
        self._store: dist.Store | None = None

    def enter(self, step: int, phase: str) -> None:
        """Say what this rank does next."""
        self._phase = Phase(self._phase.number + 1, f"step {step}, {phase}", time.monotonic())

    def arm(self) -> None:
        """From now on nothing is slow because it happens for the first time: phases and collectives have a limit."""
        if not self.armed and self.world.size > 1:
            shorten_timeouts(self.timeout_seconds + GRACE_SECONDS)
            self.armed = True

    def __enter__(self) -> Self:
        if self.world.size > 1:
            # A connection of its own: the process groups' may be busy.
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10)
            )
            self._write(beat=0)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and from_a_collective(error):
            account, _ = self._account()
            self._closed.set()
            reason = str(error).splitlines()[0].split(". ")[0]
            raise RankError(f"{account}; this rank failed in {self._phase.place}: {reason}; {WAY_OUT}") from error
        self._closed.set()

    def _watch(self) -> None:
        giving_up = threading.Thread()
        for beat in itertools.count(1):
            if self._closed.wait(BEAT_SECONDS):
                return
            phase = self._write(beat)
            late = self.armed and time.monotonic() - phase.since > self.timeout_seconds
            if late and not giving_up.is_alive():
                giving_up = threading.Thread(target=self._give_up, args=(phase,), name="giving up", daemon=True)
                giving_up.start()

    def _give_up(self, phase: Phase) -> None:
        """End the process, unless it moves on. One rank speaks for all; each leaves its stack in its log."""
        account, speaker = self._account()
        if self._phase is not phase or self._closed.is_set():
            return
        limit = f"nothing has moved for {self.timeout_seconds:.0f} s (parallel.timeout_seconds)"
        message = f"error: {account}; {limit}; {WAY_OUT}"
        with self.log.open("a") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file)
        if speaker in (None, self.world.rank):
            print(message, file=sys.stderr, flush=True)
        else:
            time.sleep(5 * BEAT_SECONDS)  # the launcher ends all ranks when the first has ended
        os._exit(EXIT_RANK_LOST)

    def _account(self) -> tuple[str, int | None]:
        """Who is where, in one line, and the first rank that is alive; takes a few seconds to see who is."""
        before, after = self._read(), None
        if before is not None:
            time.sleep(3 * BEAT_SECONDS)
            after = self._read()
        if before is None or after is None:
            return "rank 0 is gone or stopped: it does not answer", None
        silent = [rank for rank, post in enumerate(after) if post.beat == before[rank].beat]
        return describe(after, silent), min(set(range(self.world.size)) - set(silent), default=None)

    def _write(self, beat: int) -> Phase:
        """Post where this rank is."""
        assert self._store is not None
        phase = self._phase
        post = Post(f"process {os.getpid()} on {socket.gethostname()}", beat, phase.number, phase.place)
        # An error means that rank 0, which keeps the store, is gone: the account says so when it is asked for.
        with suppress(RuntimeError):
            self._store.set(f"dash_train/rank/{self.world.rank}", json.dumps(asdict(post)))
        return phase

    def _read(self) -> list[Post] | None:
        """What the ranks posted last; None if the store does not answer, and then its client may block for ever."""
        found: list[Post] = []

        def read() -> None:
            assert self._store is not None
            with suppress(RuntimeError):
                values = self._store.multi_get([f"dash_train/rank/{rank}" for rank in range(self.world.size)])
                found.extend(Post(**json.loads(value)) for value in values)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(timeout=10 * BEAT_SECONDS)
        return found if len(found) == self.world.size else None


def describe(posts: list[Post], silent: list[int]) -> str:
    """The ranks that the others wait for: those that are silent, else those that have entered the fewest phases."""
    fewest = min(post.phases for post in posts)
    blamed = silent or [rank for rank, post in enumerate(posts) if post.phases == fewest]
    others = [post for rank, post in enumerate(posts) if rank not in blamed]
    if not others:
        return f"all ranks are in {posts[0].place}: a device or the network hangs"
    first = posts[blamed[0]]
    names = f"rank {blamed[0]}" if len(blamed) == 1 else f"ranks {', '.join(map(str, blamed))}"
    what = "gone or stopped, last seen in" if silent else "still in"
    verb = "is" if len(blamed) == 1 else "are"
    return (
        f"{names} ({first.process}) {verb} {what} {first.place}; "
        f"{len(others)} other rank(s) in {max(others, key=lambda post: post.phases).place}"
    )
