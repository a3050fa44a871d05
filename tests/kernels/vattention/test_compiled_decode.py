"""The kernels of vAttention compiled for an H100 on the CPU: mma.sync, spills and shared memory."""

import pytest
from compiled_cases import compile_on_cpu


@pytest.mark.parametrize("shape", [(131_072, 32, 8, 128), (16_384, 16, 1, 256)], ids=["D128", "D256"])
def test_kernels_for_sm90(shape):
    kernels = compile_on_cpu("compile_vattention_sm90.py", *shape, "output")
    assert len(kernels) == 6
    for name, usage in kernels.items():
        assert usage["stack_bytes"] <= (0 if shape[3] == 128 else 512), name
        assert usage["shared_bytes"] <= 76_000, name  # three programs on an SM
        if name.startswith(("attend", "score")):
            assert usage["mma_sync"] > 0, name
