"""`tracking.profile`: a torch trace and a memory snapshot of some steps of a run, to look at in a browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dash_train.recipe.schema import ProfileConfig

MEMORY_EVENTS = 200_000  # allocations that the snapshot remembers


class StepProfiler:
    """Records the steps that the recipe names and writes `RUN/profile/steps-A-B.{trace.json.gz,memory.pickle}`.

    The trace opens in https://ui.perfetto.dev, the snapshot (CUDA only) in https://pytorch.org/memory_viz. A run that
    ends before the last of these steps leaves what it has recorded.
    """

    def __init__(self, config: ProfileConfig | None, run_dir: Path, device: torch.device) -> None:
        self.steps = range(config.steps[0], config.steps[1] + 1) if config else range(0)
        self.folder = run_dir / "profile"
        self.on_cuda = device.type == "cuda"
        self.recording: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step; `number` counts from 1."""
        if number not in self.steps:
            yield
            return
        if self.recording is None:
            self._start()
        with record_function(f"step {number}"):
            yield
        if number == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, if anything."""
        if self.recording is None:
            return
        if self.on_cuda:
            torch.cuda.synchronize()
        self.recording.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.steps[0]}-{self.steps[-1]}"
        self.recording.export_chrome_trace(str(self.folder / f"{name}.trace.json.gz"))
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.recording = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.recording = profile(activities=activities)
        self.recording.start()
