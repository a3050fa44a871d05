import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from dash_train.kernels.dash.triton import tiles


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles first: as many processes as there are cores run the GPU's tests, and their results do not count.

    Triton's cache on disk passes the kernels on to the real tests, which would compile one after the other.
    """
    unfit = ("alone", "grid")
    items = [item for item in session.items if not any(map(item.get_closest_marker, unfit))]
    tests = [item.nodeid for item in items if item.get_closest_marker("gpu")]
    workers = min(os.cpu_count() or 1, len(tests))
    is_worker = "DASH_COMPILING" in os.environ
    if is_worker or workers < 4 or not torch.cuda.is_available() or session.config.option.collectonly:
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    processes = [
        subprocess.Popen(
            [*command, *tests[worker::workers]],
            cwd=session.config.rootpath,
            env=os.environ | {"DASH_COMPILING": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for worker in range(workers)
    ]
    for process in processes:
        process.wait()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN and huge integers: nothing that a kernel did not write may be read."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it fresh memory is left as it is
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def change_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets constants of tiles.py for one test."""

    def change(**constants: int) -> None:
        for name, value in constants.items():
            monkeypatch.setattr(tiles, name, value)
        forget()

    def forget() -> None:
        tiles.segments.cache_clear()
        tiles.longest_first.cache_clear()
        tiles.workspace_bytes.cache_clear()

    yield change
    monkeypatch.undo()
    forget()


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch, change_tiles: Callable[..., None]) -> None:
    """As if 4 chunks' scores were all that fits into registers."""
    change_tiles(RESIDENT_CHUNKS=4, MIN_WIDTH=4)
    for name, value in {"RESIDENT_CHUNKS": 4, "MIN_WIDTH": 4, "STREAMED_WIDTH": 8}.items():
        monkeypatch.setattr(f"dash_train.kernels.dash.triton.routing.{name}", value)
