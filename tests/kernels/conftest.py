import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel is first imported


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
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 4 chunks' scores were all that fits into registers."""
    for module in ("tiles", "routing"):
        monkeypatch.setattr(f"dash_train.kernels.dash.{module}.RESIDENT_CHUNKS", 4)
        monkeypatch.setattr(f"dash_train.kernels.dash.{module}.MIN_WIDTH", 4)
    monkeypatch.setattr("dash_train.kernels.dash.routing.STREAMED_WIDTH", 8)
