"""The shipped kernels compiled for an H100 on the CPU: matrix instructions, spills and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers/compile_sm90.py"
SHARED_LIMIT = 232_448
STACK_LIMIT = {128: 128, 256: 1024}  # bytes of spills by head_dim: some at the start of a program, none in its loop
KERNELS = {
    *("summaries_kernel", "route_kernel", "list_kernel", "attend_kernel", "delta_kernel", "restore_kernel"),
    *("invert_kernel", "cut_kernel", "own_keys_kernel", "listed_keys_kernel", "add_slots_kernel"),
    *("attend_backward_kernel", "routing_queries_kernel", "routing_summaries_kernel", "summaries_backward_kernel"),
}
MATRIX_KERNELS = ("route_kernel", "attend", "own_keys", "listed_keys", "routing")


def compile_on_cpu(what: str, *shape: int) -> dict[str, dict[str, int]]:
    """What each kernel takes, by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), what, *map(str, shape)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels: dict[str, dict[str, int]] = json.loads(run.stdout)
    return kernels


@pytest.mark.parametrize(
    "shape",
    [(40_000, 16, 1, 128, 64, 1), (40_000, 16, 1, 128, 64, 16), (1_000, 16, 1, 256, 128, 1)],
    ids=["D128", "D128-R16", "D256"],
)
def test_kernels_for_sm90(shape):
    kernels = compile_on_cpu("passes", *shape)
    blocks = shape[5] > 1
    expected = KERNELS | {"mean_kernel", "spread_kernel"} if blocks else KERNELS
    assert {name.split()[0] for name in kernels} == expected
    assert ("listed_keys_kernel UNIT=4" in kernels) != blocks  # tokens named one by one
    for name, usage in kernels.items():
        assert usage["shared_bytes"] <= SHARED_LIMIT, name
        gathers = name == "listed_keys_kernel UNIT=4"  # its rows' addresses take registers
        assert usage["stack_bytes"] <= STACK_LIMIT[shape[3]] * (2 if gathers else 1), name
        if name.startswith(MATRIX_KERNELS):
            few_rows = blocks and name.startswith(("route_kernel", "routing_queries"))
            assert (usage["wgmma"] > 0) != few_rows and (usage["mma_sync"] > 0) == few_rows, name
    if shape[3] == 128:  # with 256 the registers do not suffice
        for name, usage in kernels.items():
            if name.startswith(("attend", "own_keys", "listed_keys")):
                assert not usage["serialized"], name


@pytest.mark.parametrize("shape", [(131_072, 32, 8, 128, 64), (131_072, 64, 8, 128, 64)], ids=["G4", "G8"])
def test_decoding_for_sm90(shape):
    kernels = compile_on_cpu("decode", *shape)
    assert len(kernels) == 7
    for name, usage in kernels.items():
        assert usage["stack_bytes"] == 0, name
        assert (usage["mma_sync"] > 0) == name.startswith(("score", "attend")), name
    attend = kernels["attend_parts_kernel"]
    blocks_in_flight = 2 * 2 * 2**14  # two of keys and of values
    assert attend["shared_bytes"] > blocks_in_flight
    assert 3 * attend["shared_bytes"] <= SHARED_LIMIT  # three programs fit on an SM,
    assert 3 * 128 * attend["registers"] <= 2**16  # by their registers too
