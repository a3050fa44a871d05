"""The kernels of decoding compiled for an H100 on the CPU: mma.sync, spills and shared memory."""

import pytest
from compiled_cases import SHARED_LIMIT, compile_on_cpu


@pytest.mark.parametrize("shape", [(131_072, 32, 8, 128, 64), (131_072, 64, 8, 128, 64)], ids=["G4", "G8"])
def test_kernels_for_sm90(shape):
    kernels = compile_on_cpu("compile_sm90.py", "decode", *shape)
    assert len(kernels) == 7
    for name, usage in kernels.items():
        assert usage["stack_bytes"] == 0, name
        assert (usage["mma_sync"] > 0) == name.startswith(("decode_score", "attend")), name
    attend = kernels["attend_parts_kernel"]
    blocks_in_flight = 2 * 2 * 2**14  # two of keys and of values
    assert attend["shared_bytes"] > blocks_in_flight
    assert 3 * attend["shared_bytes"] <= SHARED_LIMIT  # three programs fit on an SM,
    assert 3 * 128 * attend["registers"] <= 2**16  # by their registers too
