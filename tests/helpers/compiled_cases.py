"""What the kernels take when they are compiled for an H100, found on the CPU in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_LIMIT = 232_448
STACK_LIMIT = {128: 128, 256: 1024}  # bytes of spills by head_dim: some at the start of a program, none in its loop
# seq, heads, kv_heads, head_dim, chunk_size, routing_block
SHAPES = {
    "D128": (40_000, 16, 1, 128, 64, 1),
    "D128-R16": (40_000, 16, 1, 128, 64, 16),
    "D256": (1_000, 16, 1, 256, 128, 1),
}


def compile_on_cpu(script: str, *arguments: str | int) -> dict[str, dict[str, int]]:
    """What each kernel takes, by name; `script` is in this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels: dict[str, dict[str, int]] = json.loads(run.stdout)
    return kernels


def check_pass(kernels: dict[str, dict[str, int]], shape: tuple[int, ...], with_mma_sync: tuple[str, ...]) -> None:
    """Shared memory and spills of the kernels of a pass, and that matrix products are wgmma, of some mma.sync."""
    head_dim, routing_block = shape[3], shape[5]
    for name, usage in kernels.items():
        assert usage["shared_bytes"] <= SHARED_LIMIT, name
        gathers = name == "listed_keys_kernel UNIT=4"  # its rows' addresses take registers
        assert usage["stack_bytes"] <= STACK_LIMIT[head_dim] * (2 if gathers else 1), name
        if name.startswith(("route_kernel", "attend", "own_keys", "listed_keys", "routing")):
            few_rows = routing_block > 1 and name.startswith(with_mma_sync)
            assert (usage["wgmma"] > 0) != few_rows and (usage["mma_sync"] > 0) == few_rows, name
        if head_dim == 128 and name.startswith(("attend", "own_keys", "listed_keys")):  # 256: too few registers
            assert not usage["serialized"], name
