"""Compiles for an H100, without one, the kernels of a pass or of decoding; prints what each of them takes.

python tests/helpers/compile_sm90.py forward|backward|decode SEQ HEADS KV_HEADS HEAD_DIM CHUNK_SIZE [ROUTING_BLOCK]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.routing_state import RoutingState
from dash_train.kernels.dash.triton.backward import dash_backward
from dash_train.kernels.dash.triton.decode_append import append_newest
from dash_train.kernels.dash.triton.decode_attend import attend_lists
from dash_train.kernels.dash.triton.decode_routing import route_newest
from dash_train.kernels.dash.triton.forward import dash_forward
from dash_train.kernels.dash.triton.router_means import means_backward_operator, router_means
from dash_train.kernels.dash.triton.summaries import update_chunk_summaries

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
OPTIONS = {"num_warps", "num_stages"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def record_launches() -> dict[str, Launch]:
    """From now on launches are recorded here in place of being run: kernels by name and constants, arguments."""
    recorded = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        details = [f"{name}={constants[name]}" for name in ("WIDTH", "RESIDENT", "UNIT") if name in constants]
        recorded[" ".join([kernel.__name__, *details])] = (kernel, args, constants)

    JITFunction.run = record
    torch.cuda.current_device = lambda: 0
    return recorded


def run_pass(
    which: str, seq: int, heads: int, kv_heads: int, head_dim: int, chunk_size: int, routing_block: int = 1
) -> dict[str, Launch]:
    """The launches of the forward or the backward pass in bf16, with means of as many queries as a block has."""
    q = torch.empty(1, seq, heads, head_dim, dtype=torch.bfloat16)
    k = torch.empty(1, seq, kv_heads, head_dim, dtype=torch.bfloat16)
    config = DashConfig(chunk_size, 1.0, "geometric_mean", 1.0, routing_block)
    starts = torch.zeros(1, seq, dtype=torch.int32)
    recorded, router_q = record_launches(), None
    if routing_block > 1:
        router_q = router_means(q, None, starts, (0,), routing_block, routing_block)
    inputs = (q, k, k, k[0, 0], router_q)
    forward = dash_forward(*inputs, config=config, document_starts=starts, query_starts=(0,))
    if which == "forward":
        return recorded
    recorded = record_launches()
    dash_backward(q, *inputs, q, forward.lse, forward.kept, config=config, query_starts=(0,))
    if router_q is not None:
        means_backward_operator(router_q, False, starts, (0,), seq, routing_block, routing_block)
    return recorded


def run_decode(seq: int, heads: int, kv_heads: int, head_dim: int, chunk_size: int) -> dict[str, Launch]:
    """The launches of one token of 8 sequences in bf16, with routing blocks of 16 from the last 16 queries."""
    q = torch.empty(8, heads, head_dim, dtype=torch.bfloat16)
    cache = torch.empty(8, seq, kv_heads, head_dim, dtype=torch.bfloat16, device="meta")
    summaries = torch.empty(8, seq // chunk_size, kv_heads, head_dim)
    lengths = torch.zeros(8, dtype=torch.int32)
    config = DashConfig(chunk_size, 1.0, "geometric_mean", 1.0, routing_block=16)
    state = RoutingState.allocate(8, summaries.shape[1], heads, kv_heads, head_dim, 16, q.dtype, q.device)
    recorded = record_launches()
    k, kept = q[:, :kv_heads], (state.recent_q, state.router_q)
    update_chunk_summaries(cache, summaries, lengths, k[0], chunk_size)
    append_newest(q, k, k, cache, cache, summaries, lengths, k[0], kept, chunk_size, config.routing_block)
    attend_lists(q, cache, cache, route_newest(state.router_q, summaries, lengths, config, state.lists), config)
    return recorded


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, int]:
    """As the launcher would compile it for compute capability 9.0."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in constants.items() if name not in OPTIONS}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...], is_constexpr: bool) -> Any:
        """How a signature names the type of an argument, or of what stands at `path` in one."""
        if is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(type_of(field, (*path, i), False) for i, field in enumerate(value)))
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"

    signature = {p.name: type_of(values[p.name], (i,), p.is_constexpr) for i, p in enumerate(kernel.params)}
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {name: value for name, value in constants.items() if name in OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        remarks = _output(TOOLS / "ptxas", "-v", "-arch=sm_90a", file.name, "-o", "/dev/null")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "serialized": remarks.count("wgmma.mma_async instructions are serialized"),
        "mma_sync": compiled.asm["ptx"].count("mma.sync"),
    }


def _output(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


if __name__ == "__main__":
    what, shape = sys.argv[1], map(int, sys.argv[2:])
    launches = run_decode(*shape) if what == "decode" else run_pass(what, *shape)
    print(json.dumps({name: compile_launch(*launch) for name, launch in launches.items()}))
