"""Speed of DashAttention against full attention: on inputs made to a wanted density and union factor, or on a trained
model's own (--captured).
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_train.benchmark.captured import LayerInputs, captured_layers
from dash_train.benchmark.context import context_row
from dash_train.benchmark.timing import captured, extra_memory, kernel_times, milliseconds
from dash_train.distributed.world import init_world
from dash_train.errors import UserError

PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DENSITY_TOLERANCE = 0.05  # relative
UNION_TOLERANCE = 0.03
SCALES = (0.05, 400.0)  # routing scales, and tokens over which queries change, that the search tries
SPANS = (1.0, 4096.0)

Row = dict[str, Any]


@dataclass
class AttentionCase:
    """One row of the benchmark. density and union are what the inputs shall show; union None: no locality at all.

    routing_window None: as many queries as a block has tokens.
    """

    seq: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    routing_block: int
    routing_window: int | None
    density: float
    union: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py attention`."""
    parser.add_argument("--seq", type=int, default=32768, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers of a head (default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument(
        "--routing-block", type=int, default=1, help="tokens that share a choice of chunks (default: %(default)s)"
    )
    parser.add_argument(
        "--routing-window", type=int, help="queries whose mean chooses for a routing block (default: the routing block)"
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.25,
        help="share of the eligible chunks that a token is routed to (default: %(default)s)",
    )
    parser.add_argument(
        "--union",
        type=float,
        help="union factor that the made-up queries shall have (default: queries without any locality)",
    )
    parser.add_argument(
        "--captured",
        type=Path,
        help="time the Dash layers of a model on its own queries, keys and values: a file that `capture` wrote",
    )
    parser.add_argument(
        "--backward",
        action="store_true",
        help="time forward and backward pass together, not the forward pass alone (--captured always times both)",
    )
    parser.add_argument(
        "--graph", action="store_true", help="replay ours as a CUDA graph: without what launching takes the host"
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="time no full attention, which takes minutes on very long rows"
    )


def run(args: argparse.Namespace) -> Row:
    """The row of `launch/benchmark.py attention`; with several ranks, of a row that they share."""
    peers = {} if args.no_peers else PEERS
    if args.captured:
        return captured_row(args.captured, peers, args.graph)
    case = AttentionCase(**{field.name: getattr(args, field.name) for field in fields(AttentionCase)})
    world = init_world() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    inputs, row = make_inputs(case)
    if world:
        return row | context_row(world, inputs)
    row |= pass_row(inputs, args.backward, peers, args.graph)
    return row | kernel_times(dash_pass(inputs, args.backward))  # last: the profiler slows every launch after it


def captured_row(path: Path, peers: dict[str, SDPBackend], graph: bool = False) -> Row:
    """Forward pass, and forward and backward pass, of all Dash layers together; each by itself under "layers"."""
    layers: list[Row] = []
    for index, inputs in enumerate(captured_layers(path, "cuda")):
        if inputs.routing:
            row: Row = {"layer": index, "routing_window": inputs.window, **inputs.routing, **routing_row(inputs)}
            layers.append(row | pass_row(inputs, False, peers, graph) | pass_row(inputs, True, peers, graph))
    if not layers:
        raise UserError(f"{path}: holds no Dash layer; all of the model's attention is full")
    total: Row = {"layers": layers}
    for name in ("density", "union"):
        total[name] = sum(row[name] for row in layers) / len(layers)
    for what in ("forward", "forward_backward"):
        total[f"{what}_ms"] = sum(row[f"{what}_ms"] for row in layers)
        for peer in peers:
            times = [row[f"{what}_{peer}_ms"] for row in layers]
            total |= _against(what, peer, times[0] if isinstance(times[0], str) else sum(times), total[f"{what}_ms"])
    return total


def make_inputs(case: AttentionCase) -> tuple[LayerInputs, Row]:
    """Random tensors whose routing has the case's density and union factor, and what they show of both.

    A chunk's keys share a random direction; a query is a latent that turns to a new random direction every `span`
    tokens. The span sets the union factor, the routing scale the density; both are found by bisection.

    Raises: UserError when no span and scale come close enough.
    """
    span_low, span_high = SPANS if case.union else (SPANS[0], SPANS[0])
    for _ in range(12):
        span = math.sqrt(span_low * span_high)
        inputs, row = _with_density(case, *_random_tensors(case, span))
        if case.union is None or abs(row["union"] - case.union) < UNION_TOLERANCE / 2:
            break
        if row["union"] > case.union:
            span_low = span
        else:
            span_high = span
    density_is_met = abs(row["density"] / case.density - 1) <= DENSITY_TOLERANCE
    if not density_is_met or (case.union is not None and abs(row["union"] - case.union) > UNION_TOLERANCE):
        raise UserError(
            f"density {case.density} with union {case.union} cannot be made for {asdict(case)}: the nearest inputs "
            f"have density {row['density']:.3f}, union {row['union']:.2f}; fewer heads per KV head allow lower "
            "densities, and blocks of a whole tile have a union of 1"
        )
    return inputs, row


def _random_tensors(case: AttentionCase, span: float) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype = "cuda", torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    step = torch.arange(case.seq, device=device) / span
    before, share = step.long(), step.frac()[:, None]
    length = ((1 - share).square() + share.square()).sqrt()

    def latent() -> Tensor:
        """[seq, head_dim] of unit variance, turning from one direction to the next in `span` tokens."""
        knots = normal(int(case.seq / span) + 2, case.head_dim)
        return ((1 - share) * knots[before] + share * knots[before + 1]) / length

    q = torch.empty(case.batch, case.seq, case.heads, case.head_dim, device=device, dtype=dtype)
    for row in q:
        for group in row.split(case.heads // case.kv_heads, 1):
            common = latent()
            for head in group.unbind(1):
                head.copy_((2 * common + latent()) / math.sqrt(5))
    chunks = math.ceil(case.seq / case.chunk_size)
    size = (case.batch, case.seq, case.kv_heads, case.head_dim)
    directions = normal(case.batch, chunks, case.kv_heads, case.head_dim)
    k = (directions.repeat_interleave(case.chunk_size, 1)[:, : case.seq] + normal(*size)).to(dtype)
    return q, k, normal(*size).to(dtype)


def _with_density(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor) -> tuple[LayerInputs, Row]:
    """The inputs at the routing scale whose density comes nearest to the case's."""
    chunk_query = torch.zeros(case.kv_heads, case.head_dim, device=q.device, dtype=q.dtype)
    routing = {"chunk_size": case.chunk_size, "routing_block": case.routing_block}
    low, high = SCALES
    for _ in range(14):
        scale = math.sqrt(low * high)
        window = case.routing_window or case.routing_block
        inputs = LayerInputs(q, k, v, chunk_query, {**routing, "routing_scale": scale}, window)
        row = routing_row(inputs)
        if abs(row["density"] / case.density - 1) < DENSITY_TOLERANCE / 4:
            break
        if row["density"] > case.density:
            low = scale
        else:
            high = scale
    return inputs, {**row, "routing_scale": scale}


@torch.no_grad()
def routing_row(inputs: LayerInputs) -> Row:
    """Density and union factor."""
    _, stats = inputs.dash_attention(backend="triton", return_stats=True)
    return {"density": stats.density.item(), "union": stats.union_factor.item()}


def pass_row(inputs: LayerInputs, backward: bool, peers: dict[str, SDPBackend], graph: bool = False) -> Row:
    """Milliseconds of the forward pass, or of forward and backward pass together, ours and the peers'; memory.

    With `graph` ours is a CUDA graph of the pass. A peer that does not fit into memory or does not run has its error
    in place of a time.
    """
    what = "forward_backward" if backward else "forward"
    ours = dash_pass(inputs, backward)
    results = (inputs.q, *inputs.tensors()) if backward else ()  # sizes of the output and the gradients
    row: Row = {f"{what}_ms": milliseconds(captured(ours).replay if graph else ours)}
    row[f"{what}_extra_gib"] = extra_memory(ours) - sum(t.nbytes for t in results) / 2**30
    for name, backend in peers.items():
        row |= _against(what, name, _peer_time(inputs, backward, backend), row[f"{what}_ms"])
    return row


def _against(what: str, peer: str, time: float | str, ours: float) -> Row:
    """A peer's milliseconds and how many times faster ours is."""
    row: Row = {f"{what}_{peer}_ms": time}
    return row if isinstance(time, str) else row | {f"{what}_speedup_over_{peer}": time / ours}


def dash_pass(inputs: LayerInputs, backward: bool) -> Callable[[], object]:
    """One pass of everything: the routers' queries, attention and, with `backward`, all gradients."""
    if not backward:
        return lambda: inputs.dash_attention(backend="triton")
    leaves, upstream = inputs.leaves(), torch.randn_like(inputs.q)
    return lambda: torch.autograd.grad(leaves.dash_attention(backend="triton"), leaves.tensors(), upstream)


def _peer_time(inputs: LayerInputs, backward: bool, backend: SDPBackend) -> float | str:
    """Full causal attention on the same q, k and v.

    The KV heads are repeated beforehand, which is not timed, nor is the sum of their gradients.
    """
    try:
        group = inputs.q.shape[2] // inputs.k.shape[2]
        q = inputs.q.transpose(1, 2).contiguous()
        k, v = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (inputs.k, inputs.v))
        if not backward:
            with sdpa_kernel(backend), torch.no_grad():
                return milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats=5)
        tensors = [t.requires_grad_() for t in (q, k, v)]
        upstream = torch.randn_like(q)

        def whole() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), tensors, upstream)

        with sdpa_kernel(backend):
            return milliseconds(whole, repeats=5)
    except RuntimeError as error:  # out of memory is one
        return str(error).splitlines()[0]
