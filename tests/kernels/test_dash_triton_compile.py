"""The shipped kernels compiled for an H100 on the CPU: matrix instructions, spills and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers/compile_sm90.py"
SHARED_LIMIT = 232_448
STACK_LIMIT = {128: 128, 256: 1024}  # bytes of spills by head_dim: some at the start of a program, none in its loop
MATRIX_KERNELS = ("route_kernel", "attend", "own_keys", "listed_keys", "routing")


@pytest.mark.parametrize("shape", [(40_000, 16, 1, 128, 64), (1_000, 16, 1, 256, 128)], ids=["D128", "D256"])
def test_kernels_for_sm90(shape):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, shape)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len(kernels) == (18 if shape[0] > 32_768 else 15)
    for name, usage in kernels.items():
        assert usage["shared_bytes"] <= SHARED_LIMIT, name
        assert usage["stack_bytes"] <= STACK_LIMIT[shape[3]], name
        if name.startswith(MATRIX_KERNELS):
            assert usage["wgmma"] > 0 and usage["mma_sync"] == 0, name
    if shape[3] == 128:  # with 256 the registers do not suffice
        for name in ("attend_kernel", "attend_backward_kernel", "own_keys_kernel", "listed_keys_kernel"):
            assert not kernels[name]["serialized"], name
