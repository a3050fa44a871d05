"""Compiles for an H100, without one, the kernels of a vAttention step; prints what each of them takes.

python tests/helpers/compile_vattention_sm90.py CAPACITY HEADS KV_HEADS HEAD_DIM VERIFY
"""

import json
import sys
from typing import Any

import torch
from compile_sm90 import compile_launch
from triton.runtime.jit import JITFunction

from dash_train.kernels.vattention.reference.population import VAttentionConfig
from dash_train.kernels.vattention.triton.pipeline import vattention_triton


def launches(capacity: int, heads: int, kv_heads: int, head_dim: int, verify: str) -> dict[str, tuple[Any, ...]]:
    """The launches of one step in bf16, with a prior and page bounds, recorded in place of being run."""
    recorded = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        name = kernel.__name__ + (" extra" if constants.get("EXTRA") else "")
        recorded[name] = (kernel, args, constants)

    JITFunction.run = record
    q = torch.empty(2, heads, head_dim, dtype=torch.bfloat16)
    cache = torch.empty(2, capacity, kv_heads, head_dim, dtype=torch.bfloat16)
    summaries = torch.empty(2, capacity // 64, kv_heads, head_dim)
    bias = torch.empty(2, kv_heads, capacity // 64)
    lengths, seed = torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)
    config = VAttentionConfig(0.05, 0.05, verify, 128, 128, 0.05, 512, 0.5, 0.0, 64)
    vattention_triton(q, cache, cache, lengths, summaries, bias, (summaries, summaries), seed, config)
    return recorded


if __name__ == "__main__":
    *shape, verify = sys.argv[1:]
    compiled = launches(*map(int, shape), verify)
    print(json.dumps({name: compile_launch(*launch) for name, launch in compiled.items()}))
