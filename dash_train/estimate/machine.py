"""What an estimate takes for granted about GPUs: speeds reached by this package's training steps, not data sheets'."""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """Speeds in FLOP/s and bytes/s, measured where docs/estimate.md says so."""

    name: str
    memory: float  # bytes that PyTorch can allocate
    matmul: float  # bf16 products of a block's projections
    dash_attention: float  # of the keys attended to, forward, at head_dim 128 with routing blocks that fill a tile
    full_attention: float
    bandwidth: float  # device memory, reached
    host: float  # to or from pinned host memory, each way
    cache: float = 50e6  # bytes of L2
    link: float = 100 * GB  # to the other GPUs of its node (NVLink), each way, reached
    network: float = 50 * GB  # to GPUs of other nodes, each way


GPUS = {
    "h100": Gpu("H100 80GB", 84 * GB, 590e12, 400e12, 560e12, 2600 * GB, 25 * GB),
    "h200": Gpu("H200", 149 * GB, 590e12, 400e12, 560e12, 3800 * GB, 25 * GB),
}
NODE = 8  # GPUs that NVLink joins
