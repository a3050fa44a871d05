"""The kernels of the backward pass compiled for an H100 on the CPU: wgmma, spills and shared memory."""

import pytest
from compiled_cases import SHAPES, check_pass, compile_on_cpu

KERNELS = {
    *("delta_kernel", "restore_kernel", "invert_kernel", "cut_kernel", "own_keys_kernel", "listed_keys_kernel"),
    *("add_slots_kernel", "attend_backward_kernel", "routing_queries_kernel", "routing_summaries_kernel"),
    "summaries_backward_kernel",
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_for_sm90(name):
    kernels = compile_on_cpu("compile_sm90.py", "backward", *SHAPES[name])
    blocks = SHAPES[name][5] > 1
    assert {name.split()[0] for name in kernels} == KERNELS | ({"spread_kernel"} if blocks else set())
    assert ("listed_keys_kernel UNIT=4" in kernels) != blocks  # tokens named one by one
    check_pass(kernels, SHAPES[name], with_mma_sync=("routing_queries",))
