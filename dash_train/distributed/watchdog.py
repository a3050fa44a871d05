"""Which rank does a hung start or step wait for?

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from dash_train.distributed.world import World, from_a_collective, shorten_timeouts
from dash_train.errors import EXIT_RANK_LOST, RankError

BEAT_SECONDS = 1.0
START_SECONDS = 1800.0  # what a phase before the second step may take: files that are read, kernels that are compiled
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
    limit: float  # seconds


class Watchdog:
    """Watches this rank from its start to its end, and has an account of all.

    A phase that takes longer than its limit ends the process: `timeout_seconds` once the first step is done, before
    that what `begin` says; so does a rank that shows no sign of life for `timeout_seconds` while others start. A
    collective that fails, as when another rank has died, becomes a RankError. All name the rank that is to blame.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world, self.timeout_seconds = world, timeout_seconds
        self.log: Path | None = None
        """File that gets this rank's stack when it gives up."""
        self.armed = False
        self._phase = Phase(0, "the start", time.monotonic(), START_SECONDS)
        self._closed = threading.Event()
        self._store: dist.Store | None = None
        if world.size > 1:
            # A connection of its own: the process groups' may be busy.
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10)
            )
            self._write(beat=0)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, phase: str, limit: float | None = None) -> None:
        """Say what this rank does next before the first step, and how many seconds it may take."""
        self._phase = Phase(self._phase.number + 1, phase, time.monotonic(), limit or START_SECONDS)

    def enter(self, step: int, phase: str) -> None:
        """Say what this rank does next."""
        limit = self.timeout_seconds if self.armed else START_SECONDS
        self._phase = Phase(self._phase.number + 1, f"step {step}, {phase}", time.monotonic(), limit)

    def arm(self) -> None:
        """From now on nothing is slow because it happens for the first time: phases and collectives have a limit."""
        if not self.armed and self.world.size > 1:
            shorten_timeouts(self.timeout_seconds + GRACE_SECONDS)
            self.armed = True

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Make a RankError of a collective that fails in here; after an error nothing is watched any more."""
        try:
            yield
        except BaseException as error:
            if not from_a_collective(error):
                self.close()
                raise
            account, _, _ = self._account()
            self.close()
            reason = str(error).splitlines()[0].split(". ")[0]
            raise RankError(f"{account}; this rank failed in {self._phase.place}: {reason}; {WAY_OUT}") from error

    def _watch(self) -> None:
        giving_up = threading.Thread()
        posts, looked = self._read(), time.monotonic()
        for beat in itertools.count(1):
            if self._closed.wait(BEAT_SECONDS):
                return
            phase = self._write(beat)
            since, silent = time.monotonic() - looked, False
            if not self.armed and since > self.timeout_seconds:
                before, posts, looked = posts, self._read(), time.monotonic()
                silent = before is not None and (posts is None or bool(_silent(before, posts)))
            late = time.monotonic() - phase.since > phase.limit
            if (late or silent) and not giving_up.is_alive():
                arguments = (phase, phase.limit if late else since, not late)
                giving_up = threading.Thread(target=self._give_up, args=arguments, name="giving up", daemon=True)
                giving_up.start()

    def _give_up(self, phase: Phase, seconds: float, of_the_silent: bool) -> None:
        """End the process, unless it moves on, or the ranks that were silent speak again. One rank speaks for all; each
        leaves its stack in its log."""
        account, speaker, silent = self._account()
        if self._phase is not phase or self._closed.is_set() or (of_the_silent and silent == []):
            return
        key = " (parallel.timeout_seconds)" if self.armed else ""
        message = f"error: {account}; nothing has moved for {seconds:.0f} s{key}; {WAY_OUT}"
        if self.log is not None:
            with self.log.open("a") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file)
        if speaker in (None, self.world.rank):
            print(message, file=sys.stderr, flush=True)
        else:
            time.sleep(5 * BEAT_SECONDS)  # the launcher ends all ranks when the first has ended
        os._exit(EXIT_RANK_LOST)

    def _account(self) -> tuple[str, int | None, list[int] | None]:
        """Who is where, in one line, the first rank that is alive, and those that are not; takes a few seconds to see
        who is. Where rank 0 does not answer, none is known."""
        before, after = self._read(), None
        if before is not None:
            time.sleep(3 * BEAT_SECONDS)
            after = self._read()
        if before is None or after is None:
            return "rank 0 is gone or stopped: it does not answer", None, None
        silent = _silent(before, after)
        return describe(after, silent), min(set(range(self.world.size)) - set(silent), default=None), silent

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


def _silent(before: list[Post], after: list[Post]) -> list[int]:
    """The ranks that have not posted in between."""
    return [rank for rank, (one, other) in enumerate(zip(before, after, strict=True)) if one.beat == other.beat]


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
