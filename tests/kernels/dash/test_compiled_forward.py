"""The kernels of the forward pass compiled for an H100 on the CPU: wgmma, spills and shared memory."""

import pytest
from compiled_cases import SHAPES, check_pass, compile_on_cpu

KERNELS = {"summaries_kernel", "route_kernel", "shorten_lists_kernel", "attend_kernel"}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_for_sm90(name):
    kernels = compile_on_cpu("compile_sm90.py", "forward", *SHAPES[name])
    means = {"mean_kernel"} if SHAPES[name][5] > 1 else set()
    assert {name.split()[0] for name in kernels} == KERNELS | means
    check_pass(kernels, SHAPES[name], with_mma_sync=("route_kernel",))
