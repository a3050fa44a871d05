"""The kernels of vAttention compiled for an H100 on the CPU: matrix instructions, spills and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers/compile_vattention_sm90.py"


@pytest.mark.parametrize("shape", [(131_072, 32, 8, 128), (16_384, 16, 1, 256)], ids=["D128", "D256"])
def test_kernels_for_sm90(shape):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, shape), "output"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len(kernels) == 6
    for name, usage in kernels.items():
        assert usage["stack_bytes"] <= (0 if shape[3] == 128 else 512), name
        assert usage["shared_bytes"] <= 76_000, name  # three programs on an SM
        if name.startswith(("attend", "score")):
            assert usage["mma_sync"] > 0, name
