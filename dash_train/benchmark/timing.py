"""How every benchmark measures: medians of runs by CUDA events, kernels by the profiler, memory at its peak."""

from collections.abc import Callable

import torch


def milliseconds(function: Callable[[], object], repeats: int = 11) -> float:
    """Median over repeated runs, after two that do not count."""
    function(), function()
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
