"""Which ranks hold the others up? All wait for the slowest at every step, so that step times are equal and say nothing.

Now and then every rank times the same matrix product on its own GPU, and says how long it waited for data meanwhile.
"""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import torch

from dash_train.distributed.world import World, gather_objects

SLOWER = 1.25  # times the median
WAITING = 0.1  # of the time went into waiting for data
SIZE, TIMES = 4096, 20  # of the product: some 5 ms on an H100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    host: str
    product_seconds: float
    """Of the product; 0 on a CPU, where other processes have their share."""
    waited: float
    """Share of the time since the last report that it waited for data."""
    gpu: str = ""
    """Temperature and clock, where NVML (package nvidia-ml-py) says so."""


class SlowRanks:
    """Compares the ranks every so many steps; each calls `step` after every step."""

    def __init__(self, world: World, every: int) -> None:
        self.world, self.every = world, every
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()

    def step(self, waited: float) -> None:
        """Count a step and the seconds that it waited for data; warn of slow ranks when it is time."""
        self._waited += waited
        self._steps += 1
        if self.world.size == 1 or not self.every or self._steps % self.every:
            return
        now = time.perf_counter()
        report = Report(
            socket.gethostname(), time_product(self.world.device), self._waited / (now - self._since), _gpu()
        )
        self._waited, self._since = 0.0, now
        reports = gather_objects(report)
        for line in slow(reports) if self.world.is_main else ():
            logger.warning("%s", line)


def slow(reports: list[Report]) -> Iterator[str]:
    """A line for each rank that is slower than the others."""
    usual = median(report.product_seconds for report in reports)
    usual_wait = median(report.waited for report in reports)
    for rank, report in enumerate(reports):
        where = f"rank {rank} (on {report.host}{', ' + report.gpu if report.gpu else ''})"
        if report.product_seconds > SLOWER * usual:
            yield (
                f"{where} is slow: a product takes {report.product_seconds / usual:.2f} times as long as elsewhere; "
                "all ranks wait for it"
            )
        if report.waited > max(WAITING, 2 * usual_wait):
            yield f"{where} waits for data for {report.waited:.0%} of the time; all ranks wait for it"


def time_product(device: torch.device) -> float:
    """Seconds of a product of two matrices, the best of some; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    a = torch.ones(SIZE, SIZE, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ a
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    with suppress(ModuleNotFoundError, RuntimeError):
        return f"{torch.cuda.temperature()} degrees, {torch.cuda.clock_rate()} MHz"
    return ""
