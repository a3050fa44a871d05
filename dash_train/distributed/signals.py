"""Preemption: a signal to any rank, or the end of its launcher, sets a flag, and the trainer acts on it at the next
step boundary; before the first step there is nothing to save, and the process ends at once."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")
AGAIN_SECONDS = 1.0  # `timeout -s INT` sends its signal to the process and to its group: that is one

logger = logging.getLogger(__name__)


class StopFlag:
    """Set by the first signal; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        """Steps are being taken, so that there is something to save."""
        self._since = 0.0
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._receive)
        if launchers := _launchers():
            threading.Thread(target=_watch, args=(launchers,), name="launcher", daemon=True).start()

    def close(self) -> None:
        """Let Ctrl-C and the others do what they do elsewhere."""
        for number in STOPPING:
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received == "SIGINT" and number == signal.SIGINT
        if again and time.monotonic() - self._since > AGAIN_SECONDS:
            os._exit(128 + number)
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        if not self.training:
            logger.info("stopped by %s before the first step; run the same command to start again", self.received)
            raise SystemExit(0)


def _launchers() -> list[psutil.Process]:
    """The launchers above this process: its parent, that one's parent and so on, as far as they are launchers."""
    found: list[psutil.Process] = []
    try:
        for parent in psutil.Process().parents():
            program, *words = parent.cmdline()[:4] or [""]
            if "python" not in Path(program).name or not any(name in word for name in LAUNCHERS for word in words):
                break
            found.append(parent)
    except psutil.Error:
        pass
    return found


def _watch(launchers: list[psutil.Process]) -> None:
    """A launcher that is killed tells its ranks nothing: they would train on without anyone who knows of them."""
    with suppress(psutil.NoSuchProcess):
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in launchers):
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
