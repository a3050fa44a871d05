"""Preemption: a signal to any rank sets a flag, and the trainer acts on it at the next step boundary."""

import signal
from types import FrameType


class StopFlag:
    """Set by SIGTERM or SIGUSR1."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
