"""Speed of DashAttention against full attention, on inputs made to a wanted density and union factor."""

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_train.benchmark.context import context_row
from dash_train.benchmark.timing import extra_memory, kernel_times, milliseconds
from dash_train.errors import UserError
from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.attend import attend_segment
from dash_train.kernels.dash.lists import list_segment, new_prior
from dash_train.kernels.dash.routing import new_routing, route_segment
from dash_train.kernels.dash.routing_counts import routing_counts
from dash_train.kernels.dash.stages import DashConfig
from dash_train.kernels.dash.summaries import summarize_chunks
from dash_train.kernels.dash.tiles import Lists, Segment, Shape, new_lists
from dash_train.parallel import init_world

STAGES = ("summaries", "routing", "lists", "attention")
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DENSITY_TOLERANCE = 0.05  # relative
UNION_TOLERANCE = 0.03
SCALES = (0.05, 400.0)  # routing scales, and tokens over which queries change, that the search tries
SPANS = (1.0, 4096.0)


@dataclass
class AttentionCase:
    """One row of the benchmark. density and union are what the inputs shall show; union None: no locality at all."""

    seq: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    density: float
    union: float | None

    def shape(self) -> Shape:
        return Shape(self.batch, self.seq, self.seq, self.heads, self.kv_heads, self.head_dim, self.chunk_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py attention`."""
    parser.add_argument("--seq", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--union", type=float, help="wanted union factor (default: queries without any locality)")
    parser.add_argument("--backward", action="store_true", help="time forward and backward pass together")
    parser.add_argument("--no-peers", action="store_true", help="ours alone, where full attention would take minutes")


def run(args: argparse.Namespace) -> dict[str, float | str]:
    """The row of `launch/benchmark.py attention`; with several ranks, of a row that they share."""
    case = AttentionCase(**{field.name: getattr(args, field.name) for field in fields(AttentionCase)})
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        world = init_world()
        inputs = make_inputs(case)
        shared = context_row(world, inputs.q, inputs.k, inputs.v, inputs.chunk_query, inputs.config)
        return {"density": inputs.density, "union": inputs.union, **shared}
    peers = {} if args.no_peers else PEERS
    return backward_row(case, peers) if args.backward else forward_row(case, peers)


@dataclass
class Inputs:
    """Tensors of one case, the routing scale that was found, and the density and union factor that they show."""

    q: Tensor
    k: Tensor
    v: Tensor
    chunk_query: Tensor
    config: DashConfig
    density: float
    union: float


def make_inputs(case: AttentionCase) -> Inputs:
    """Random tensors whose routing has the case's density and union factor.

    A chunk's keys share a random direction; a query is a latent that turns to a new random direction every `span`
    tokens. The span sets the union factor, the routing scale the density; both are found by bisection.

    Raises: UserError when no span and scale come close enough.
    """
    span_low, span_high = SPANS if case.union else (SPANS[0], SPANS[0])
    for _ in range(12):
        span = math.sqrt(span_low * span_high)
        inputs = _with_density(case, *_random_tensors(case, span))
        if case.union is None or abs(inputs.union - case.union) < UNION_TOLERANCE / 2:
            break
        if inputs.union > case.union:
            span_low = span
        else:
            span_high = span
    density_is_met = abs(inputs.density / case.density - 1) <= DENSITY_TOLERANCE
    if not density_is_met or (case.union is not None and abs(inputs.union - case.union) > UNION_TOLERANCE):
        raise UserError(
            f"density {case.density} with union {case.union} cannot be made for {asdict(case)}: the nearest inputs "
            f"have density {inputs.density:.3f}, union {inputs.union:.2f}; fewer heads per KV head allow lower ones"
        )
    return inputs


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


def _with_density(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """The inputs at the routing scale whose density comes nearest to the case's."""
    chunk_query = torch.zeros(case.kv_heads, case.head_dim, device=q.device, dtype=q.dtype)
    low, high = SCALES
    for _ in range(14):
        config = DashConfig(case.chunk_size, math.sqrt(low * high), "geometric_mean", 1.0)
        density, union = _routing(case, q, k, chunk_query, config)
        if abs(density / case.density - 1) < DENSITY_TOLERANCE / 4:
            break
        if density > case.density:
            low = config.routing_scale
        else:
            high = config.routing_scale
    return Inputs(q, k, v, chunk_query, config, density, union)


def _routing(case: AttentionCase, q: Tensor, k: Tensor, chunk_query: Tensor, config: DashConfig) -> tuple[float, float]:
    """Density and union factor, without stage 2."""
    starts = torch.zeros(1, case.seq, dtype=torch.int32, device=q.device)
    active_chunks, union_chunks = routing_counts(q, k, chunk_query, config=config, document_starts=starts)
    active = active_chunks.sum().item()
    eligible = case.batch * case.kv_heads * (torch.arange(case.seq) // case.chunk_size).sum().item()
    return active / eligible, case.shape().tile_tokens * union_chunks.sum().item() / max(active, 1)


def backward_row(case: AttentionCase, peers: dict[str, SDPBackend]) -> dict[str, float | str]:
    """Milliseconds of forward and backward pass together, of each kernel in them, and of its peers; memory."""
    inputs = make_inputs(case)
    tensors = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.chunk_query)]
    upstream = torch.randn_like(inputs.q)
    config = asdict(inputs.config)

    def whole() -> None:
        torch.autograd.grad(dash_attention(*tensors, **config, backend="triton"), tensors, upstream)

    row: dict[str, float | str] = {"density": inputs.density, "union": inputs.union}
    total = milliseconds(whole)
    row["forward_backward_ms"] = total
    row["extra_gib"] = extra_memory(whole) - sum(t.nbytes for t in (upstream, *tensors)) / 2**30
    row |= _peer_rows(case, inputs, peers, total, upstream)
    return row | kernel_times(whole)  # last: once it has run, the profiler slows every launch down


def forward_row(case: AttentionCase, peers: dict[str, SDPBackend]) -> dict[str, float | str]:
    """Milliseconds of each stage, of the whole forward pass and of its peers; rates and memory.

    A peer that does not fit into memory or does not run has its error in place of a time.
    """
    inputs = make_inputs(case)
    starts = torch.zeros(1, case.seq, dtype=torch.int32, device=inputs.q.device)
    row: dict[str, float | str] = {"density": inputs.density, "union": inputs.union}
    row["routing_scale"] = inputs.config.routing_scale
    config = asdict(inputs.config)

    def whole() -> None:
        dash_attention(inputs.q, inputs.k, inputs.v, inputs.chunk_query, **config, backend="triton")

    forward = milliseconds(whole)
    row["forward_ms"] = forward
    row["extra_gib"] = extra_memory(whole)
    row |= _stage_times(case, inputs, starts)
    own_chunks = case.batch * case.kv_heads * case.shape().tiles(case.seq)
    chunk_products = float(row.pop("listed_chunks")) + own_chunks
    rows = case.shape().tile_tokens * case.heads // case.kv_heads
    flops = 4 * rows * case.chunk_size * case.head_dim * chunk_products
    row["attention_tflops_on_union"] = flops / float(row["attention_ms"]) / 1e9
    return row | _peer_rows(case, inputs, peers, forward)


def _stage_times(case: AttentionCase, inputs: Inputs, starts: Tensor) -> dict[str, float]:
    """Median of each stage over repeated runs, summed over segments; and the chunks that the tiles' lists hold."""
    shape, config = case.shape(), inputs.config
    q, k, v = inputs.q, inputs.k, inputs.v
    routing, prior = new_routing(shape, 1, q.device), new_prior(shape, q.device)
    out, lse = torch.empty_like(q), torch.empty_like(routing.tau)
    parts = summarize_chunks(k, inputs.chunk_query, case.chunk_size)[1]
    times = dict.fromkeys(STAGES, 0.0)
    times["summaries"] = milliseconds(lambda: summarize_chunks(k, inputs.chunk_query, case.chunk_size))
    for segment, lists in new_lists(shape, (0,), q.device):

        def route(segment: Segment = segment, lists: Lists = lists) -> None:
            route_segment(q, parts, starts, config, shape, segment, lists, routing)

        def route_and_list(segment: Segment = segment, lists: Lists = lists) -> None:
            route_segment(q, parts, starts, config, shape, segment, lists, routing)
            list_segment(config, shape, segment, lists, routing, prior)

        def attend(segment: Segment = segment, lists: Lists = lists) -> None:
            attend_segment(q, k, v, shape, segment, lists, routing, out, lse)

        routing_time = milliseconds(route, repeats=5)
        times["routing"] += routing_time
        times["lists"] += milliseconds(route_and_list, repeats=5) - routing_time  # it changes what routing wrote
        times["attention"] += milliseconds(attend, repeats=5)
    result = {f"{name}_ms": value for name, value in times.items()}
    return result | {"listed_chunks": float(routing.union_chunks.sum())}


def _peer_rows(
    case: AttentionCase,
    inputs: Inputs,
    peers: dict[str, SDPBackend],
    ours: float,
    upstream: Tensor | None = None,
) -> dict[str, float | str]:
    """Each peer's milliseconds and how many times faster ours is."""
    row: dict[str, float | str] = {}
    for name, backend in peers.items():
        row[f"{name}_ms"] = time = _peer_time(case, inputs, backend, upstream)
        if isinstance(time, float):
            row[f"speedup_over_{name}"] = time / ours
    return row


def _peer_time(case: AttentionCase, inputs: Inputs, backend: SDPBackend, upstream: Tensor | None = None) -> float | str:
    """Full causal attention, with `upstream` (a gradient like q) also backward.

    The KV heads are repeated beforehand, which is not timed, nor is the sum of their gradients.
    """
    try:
        group = case.heads // case.kv_heads
        q = inputs.q.detach().transpose(1, 2).contiguous()
        k, v = (t.detach().transpose(1, 2).repeat_interleave(group, 1) for t in (inputs.k, inputs.v))
        if upstream is None:
            with sdpa_kernel(backend), torch.no_grad():
                return milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats=5)
        tensors = [t.requires_grad_() for t in (q, k, v)]
        gradient = upstream.transpose(1, 2).contiguous()

        def whole() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), tensors, gradient)

        with sdpa_kernel(backend):
            return milliseconds(whole, repeats=5)
    except RuntimeError as error:  # out of memory is one
        return str(error).splitlines()[0]
