"""Speed of decoding one token a sequence over a long cache, against full attention over the same cache."""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_train.benchmark.timing import captured, extra_memory, kernel_times, milliseconds
from dash_train.errors import UserError
from dash_train.kernels.dash import RoutingState, append_token, dash_decode
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.triton.decode_routing import route_newest
from dash_train.kernels.dash.triton.summaries import summarize_chunks

PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DENSITY_TOLERANCE = 0.05  # relative
SCALES = (0.05, 400.0)  # routing scales that the search tries
COLD_BYTES = 2**28  # between two uses of the same input others of this size are read: several times the L2 cache
CALLS = 8  # at least, in one timed run: its own launch is then not seen
STEPS = 64  # with routing blocks, of each sequence: a multiple of any block

Row = dict[str, float | str]


@dataclass
class DecodeCase:
    """One row of the benchmark."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    density: float
    routing_block: int
    routing_window: int

    @property
    def eligible_chunks(self) -> int:
        """Chunks before the newest token's own."""
        return (self.context - 1) // self.chunk_size

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all sequences, bf16."""
        return self.batch * self.context * self.kv_heads * self.head_dim * 2 * 2


@dataclass
class Inputs:
    """One set of tensors as dash_decode takes them; every sequence has the case's context."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    summaries: Tensor
    lengths: Tensor
    state: RoutingState


VATTENTION_OPTIONS: tuple[tuple[str, float | int, str], ...] = (
    ("epsilon", 0.05, "relative error"),
    ("delta", 0.05, "share of the cases in which the error may exceed epsilon"),
    ("heavy", 0.05, "share of the chunks that is read for certain, by their summaries"),
    ("max-sample", 0.5, "largest share of the other tokens to sample; beyond it all are read"),
    ("base-sample", 512, "tokens of the first sample, which estimates the variance"),
    ("sink", 128, "first tokens that are read for certain"),
    ("window", 128, "last tokens that are read for certain"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py decode`."""
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=131072, help="tokens in the cache, the newest included (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers of a head (default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument(
        "--decode",
        choices=("full", "dash", "vattention"),
        default="dash",
        help="how the newest token attends (default: %(default)s)",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.05,
        help="dash: share of the eligible chunks that a token is routed to (default: %(default)s)",
    )
    parser.add_argument(
        "--routing-block",
        type=int,
        default=1,
        help=f"dash: tokens that share a choice of chunks; above 1 {STEPS} steps are averaged (default: 1)",
    )
    parser.add_argument(
        "--routing-window",
        type=int,
        help="dash: queries whose mean chooses for a routing block (default: the routing block)",
    )
    for name, default, about in VATTENTION_OPTIONS:
        meaning = f"vattention: {about} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument(
        "--verify",
        choices=("output", "denominator"),
        default="output",
        help="vattention: what the error is measured of (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> Row:
    """The row of `launch/benchmark.py decode`."""
    args.routing_window = args.routing_window or args.routing_block
    case = DecodeCase(**{field.name: getattr(args, field.name) for field in fields(DecodeCase)})
    if args.decode == "dash":
        row, inputs = dash_row(case)
    elif args.decode == "vattention":
        names = ("epsilon", "delta", "verify", "heavy", "base_sample", "max_sample", "sink", "window")
        row, inputs = vattention_row(case, {name: getattr(args, name) for name in names})
    else:
        row, inputs = {}, _plain_inputs(case, seed=0)
    return row | _peer_times(case, inputs, float(row.get("decode_ms", 0.0)))


def dash_row(case: DecodeCase) -> tuple[Row, Inputs]:
    """Milliseconds of dash_decode and of each kernel in it, the rate at which it reads what it must, and memory.

    Where routing looks back, the mean over STEPS tokens up to the context, what append_token takes included.
    """
    sets, config = make_inputs(case)
    keys = _attended_keys(sets, config).sum().item() / len(sets)
    summaries = case.batch * case.kv_heads * case.eligible_chunks
    must_read = case.head_dim * (keys * 2 * sets[0].k_cache.element_size() + summaries * 4)

    def decode(inputs: Inputs, _step: int) -> Tensor:
        caches = (inputs.k_cache, inputs.v_cache, inputs.summaries)
        return dash_decode(inputs.q, *caches, inputs.lengths, **config._asdict(), backend="triton")

    row: Row = {"density": _density(case, sets, config), "routing_scale": config.routing_scale}
    if case.routing_block == case.routing_window == 1:
        return row | _decode_times(decode, sets, must_read), sets[0]
    step = _block_step(config._replace(routing_block=case.routing_block), sets)
    return row | _decode_times(step, sets, must_read, STEPS), sets[0]


def _block_step(config: DashConfig, sets: list[Inputs]) -> Callable[[Inputs, int], Tensor]:
    """append_token and dash_decode of tokens up to the context; their queries are all the same, and so their mean."""
    lengths = [sets[0].lengths - STEPS + 1 + step for step in range(STEPS)]
    chunk_query = torch.zeros_like(sets[0].k_cache[0, 0])

    def step(inputs: Inputs, step: int) -> Tensor:
        caches = (inputs.k_cache, inputs.v_cache)
        append_token(
            inputs.q,
            inputs.k_cache[:, 0],
            inputs.v_cache[:, 0],
            *caches,
            lengths[step],
            summaries=inputs.summaries,
            chunk_query=chunk_query,
            state=inputs.state,
            chunk_size=config.chunk_size,
            routing_block=config.routing_block,
            backend="triton",
        )
        options = {**config._asdict(), "state": inputs.state, "backend": "triton"}
        return dash_decode(inputs.q, *caches, inputs.summaries, lengths[step], **options)

    return step


def vattention_row(case: DecodeCase, options: dict[str, Any]) -> tuple[Row, Inputs]:
    """Times of vattention_decode on inputs like those of the published claims, what it read, and an input."""
    from dash_train.kernels.vattention import vattention_decode

    sets = [_plain_inputs(case, seed) for seed in range(_sets(case, 0.1))]

    def decode(inputs: Inputs, _step: int = 0) -> Any:
        caches = (inputs.k_cache, inputs.v_cache, inputs.lengths)
        return vattention_decode(inputs.q, *caches, summaries=inputs.summaries, **options)

    reports = [decode(inputs)[1] for inputs in sets]
    read = torch.stack([report.tokens_read for report in reports]).float()
    must_read = read.mean().item() * case.batch * case.kv_heads * case.head_dim * sets[0].k_cache.element_size() * 2
    row: Row = {
        "density": read.mean().item() / case.context,
        "worst_half_width": max(report.half_width.max().item() for report in reports),
        "dense_fallbacks": sum(report.dense_fallback.float().mean().item() for report in reports) / len(reports),
    }
    return row | _decode_times(decode, sets, must_read), sets[0]


def _decode_times(decode: Callable[[Inputs, int], object], sets: list[Inputs], must_read: float, steps: int = 1) -> Row:
    """Per call, by replays of a graph that goes through all sets, so that none of them is in the cache of the device.

    All steps are gone through equally often. The kernels' times are those of the same replays in the profiler.
    """
    rounds = steps * -(-CALLS // (steps * len(sets)))
    calls = rounds * len(sets)

    def whole() -> None:
        for step in range(rounds):
            for inputs in sets:
                decode(inputs, step % steps)

    graph = captured(whole)
    time = milliseconds(graph.replay) / calls
    row: Row = {"decode_ms": time, "must_read_gb_per_s": must_read / time / 1e6}
    row |= {name: total / calls for name, total in kernel_times(graph.replay, least=0.0).items()}
    row["extra_mib"] = extra_memory(lambda: decode(sets[0], 0)) * 1024
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def make_inputs(case: DecodeCase) -> tuple[list[Inputs], DashConfig]:
    """Sets of random tensors, and the routing scale, found by bisection, at which they have the case's density.

    A chunk's keys share a random direction, and the heads of a group most of theirs.

    Raises: UserError when no scale comes close enough.
    """
    sets = [_routed_inputs(case, seed) for seed in range(_sets(case, case.density))]
    low, high = SCALES
    density = 0.0
    for _ in range(20):
        config = DashConfig(case.chunk_size, math.sqrt(low * high), "geometric_mean", 1.0)
        density = _density(case, sets, config)
        if abs(density / case.density - 1) < DENSITY_TOLERANCE / 4:
            break
        if density > case.density:
            low = config.routing_scale
        else:
            high = config.routing_scale
    if abs(density / case.density - 1) > DENSITY_TOLERANCE:
        raise UserError(f"density {case.density} cannot be made for {asdict(case)}: the nearest is {density:.4f}")
    return sets, config


def _attended_keys(sets: list[Inputs], config: DashConfig) -> Tensor:
    """[sets, batch, kv_heads]: what the newest tokens attend to, own chunk included."""
    return torch.stack([route_newest(x.q, x.summaries, x.lengths, config).keys for x in sets])


def _density(case: DecodeCase, sets: list[Inputs], config: DashConfig) -> float:
    routed = -(-_attended_keys(sets, config) // case.chunk_size) - 1
    return routed.float().mean().item() / case.eligible_chunks


def _sets(case: DecodeCase, density: float) -> int:
    """How many sets must be read in turn so that none is found in the L2 cache."""
    return max(1, math.ceil(COLD_BYTES / (case.cache_bytes * density)))


def _routed_inputs(case: DecodeCase, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)
    chunks = math.ceil(case.context / case.chunk_size)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    def keys() -> Tensor:
        directions = normal(chunks, case.kv_heads, case.head_dim).repeat_interleave(case.chunk_size, 0)
        return directions[: case.context] + normal(case.context, case.kv_heads, case.head_dim)

    group = case.heads // case.kv_heads
    common = normal(case.batch, case.kv_heads, 1, case.head_dim)
    q = (2 * common + normal(case.batch, case.kv_heads, group, case.head_dim)) / math.sqrt(5)
    values = (case.context, case.kv_heads, case.head_dim)
    return _inputs(case, q.flatten(1, 2), keys, lambda: normal(*values))


def _plain_inputs(case: DecodeCase, seed: int) -> Inputs:
    """Keys and queries N(0, 1), so logits have a standard deviation of 1; values 1 + N(0, 1)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (case.context, case.kv_heads, case.head_dim)
    q = torch.randn(case.batch, case.heads, case.head_dim, generator=generator, device="cuda")

    def keys() -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    return _inputs(case, q, keys, lambda: 1 + keys())


def _inputs(case: DecodeCase, q: Tensor, keys: Callable[[], Tensor], values: Callable[[], Tensor]) -> Inputs:
    """bf16 tensors; `keys` and `values` make those of one sequence, so that the caches may fill the device."""
    size = (case.batch, case.context, case.kv_heads, case.head_dim)
    k_cache, v_cache = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for k, v in zip(k_cache, v_cache, strict=True):
        k.copy_(keys())
        v.copy_(values())
    chunk_query = torch.zeros(case.kv_heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
    summaries, _ = summarize_chunks(k_cache, chunk_query, case.chunk_size)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    sizes = (case.batch, summaries.shape[1], case.heads, case.kv_heads, case.head_dim, case.routing_window)
    state = RoutingState.allocate(*sizes, torch.bfloat16, q.device)
    return Inputs(q.bfloat16(), k_cache, v_cache, summaries, lengths, state)


def _peer_times(case: DecodeCase, inputs: Inputs, decode_ms: float) -> Row:
    """Full attention by SDPA over the same keys and values, laid out as it likes them; and the better one's ratio.

    Where no backend takes the batch, `batch` times the time of a single sequence stands in, and the row says so.
    """
    row: Row = {}
    times = []
    for batch in (case.batch, 1):
        for name, backend in PEERS.items():
            label = name if batch == case.batch else f"{name}_one_sequence"
            times += [case.batch / batch * time for time in _time_peer(case, inputs, batch, backend, label, row)]
        if times:
            row["sdpa_ms"] = min(times)
            if batch < case.batch:
                row["sdpa_note"] = f"SDPA refused the batch: sdpa_ms is {case.batch} times that of one sequence"
            if decode_ms:
                row["speedup_over_sdpa"] = min(times) / decode_ms
            break
    return row


def _time_peer(case: DecodeCase, inputs: Inputs, batch: int, backend: SDPBackend, label: str, row: Row) -> list[float]:
    """The times of both ways to share keys among a group, each with and without a graph, as far as they run.

    The ways are enable_gqa, and the group's heads as rows of queries. Adds the best of each, or its error, to `row`.
    """
    try:
        k, v = (t[:batch].transpose(1, 2).contiguous() for t in (inputs.k_cache, inputs.v_cache))
    except RuntimeError as error:  # out of memory is one
        row[f"{label}_ms"] = str(error).splitlines()[0]
        return []
    group = case.heads // case.kv_heads
    ways = {
        "enable_gqa": (inputs.q[:batch, :, None], group > 1),
        "group_as_rows": (inputs.q[:batch].unflatten(1, (case.kv_heads, group)), False),
    }
    times = []
    for way, (q, enable_gqa) in ways.items():

        def whole(q: Tensor = q, enable_gqa: bool = enable_gqa) -> None:
            for _ in range(CALLS):
                F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)

        of_way: list[float] = []
        try:
            with sdpa_kernel(backend), torch.no_grad():
                of_way.append(milliseconds(whole) / CALLS)
                of_way.append(milliseconds(captured(whole).replay) / CALLS)
        except RuntimeError as error:
            row[f"{label}_{way}_ms"] = str(error).splitlines()[0]
        if of_way:
            row[f"{label}_{way}_ms"] = min(of_way)
        times += of_way
    return times
