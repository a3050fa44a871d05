"""How every benchmark measures: medians by CUDA events, kernels by the profiler, memory at its peak."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

WARM_UP = 0.05  # seconds: allocations settle, and so does what the host does for a short kernel
REPEATED = 0.1


def milliseconds(function: Callable[[], object], repeats: int = 11) -> float:
    """Median over repeated runs (of short ones REPEATED seconds), after WARM_UP seconds that do not count."""
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    runs = 0
    while not runs or time.perf_counter() - began < WARM_UP:
        function()
        torch.cuda.synchronize()
        runs += 1
    repeats = max(repeats, int(REPEATED * runs / (time.perf_counter() - began)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one run, after two that warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(), function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def extra_memory(function: Callable[[], object]) -> float:
    """GiB that a run allocates at its peak, the output included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def kernel_times(function: Callable[[], object], least: float = 0.01) -> dict[str, float]:
    """Milliseconds that one run spends in each kernel, the longest first; kernels below `least` are left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 1000 for event in profile.key_averages()}
    longest = sorted(times, key=lambda name: -times[name])
    return {f"{name[:40]}_ms": times[name] for name in longest if times[name] > least}


class Phases:
    """Time of a step by phase: between marks on the device (CUDA events), or by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """What is queued from now on belongs to `phase`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, its parts added up; the last one ends here. Waits for the device."""
        self.enter("end")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for (phase, begin), (_, end) in pairwise(self.marks):
            passed = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
            total[phase] = total.get(phase, 0.0) + passed
        return total
