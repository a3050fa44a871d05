"""Cases for the Triton kernels of DashAttention, and how one is compared with the reference."""

import itertools
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_train.kernels.dash import DashStats, dash_attention, router_queries

VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "head_dim": (32, 64, 96, 128, 256),
    "group": (1, 2, 4, 6, 8, 16, 32),
    "chunk_size": (16, 32, 64, 128),
    "normalizer": ("geometric_mean", "none", "peak"),
    "documents": (False, True),
    "ragged": (False, True),
    "routing_block": (1, 4, 16, 64),  # of more than a chunk: a chunk
}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 2e-5}


class Case(NamedTuple):
    dtype: torch.dtype = torch.float32
    head_dim: int = 32
    group: int = 2
    chunk_size: int = 16
    normalizer: str = "geometric_mean"
    documents: bool = False
    ragged: bool = False
    routing_block: int = 1

    def __str__(self) -> str:
        flags = "-documents" * self.documents + "-ragged" * self.ragged
        kind = str(self.dtype).removeprefix("torch.")
        name = f"{kind}-D{self.head_dim}-G{self.group}-C{self.chunk_size}-R{self.routing_block}"
        return f"{name}-{self.normalizer}{flags}"


def grid() -> list[Case]:
    cases = [Case(*values) for values in itertools.product(*VALUES.values())]
    return [case for case in cases if case.routing_block <= case.chunk_size]


def covering_array() -> list[Case]:
    """Few cases in which every pair of values of two different parameters occurs: the next one always adds the most."""
    generator = random.Random(0)
    drawn = [Case(*map(generator.choice, VALUES.values())) for _ in range(1000)]
    candidates = [case for case in drawn if case.routing_block <= case.chunk_size]
    pairs = [set(itertools.combinations(enumerate(case), 2)) for case in candidates]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(candidates)), key=lambda i: len(pairs[i] & missing))
        chosen.append(candidates[best])
        missing -= pairs[best]
    return chosen


def call(
    case: Case, chunks: int, device: str, kv_heads: int = 2, batch: int = 2
) -> tuple[list[Tensor], dict[str, Any]]:
    """Random tensors and the arguments of dash_attention; about `chunks` chunks a row.

    Blocks of several tokens are routed by the mean of a few more queries than half a block has.
    """
    seq = chunks * case.chunk_size - (case.chunk_size // 2 + 3 if case.ragged else 0)
    starts = torch.zeros(batch, seq, dtype=torch.int32, device=device)
    if case.documents:
        for row, first in enumerate((2 * case.chunk_size, (chunks - 3) * case.chunk_size)):
            starts[row, first:] = first
    shapes = [(batch, seq, heads, case.head_dim) for heads in (case.group * kv_heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, device=device).to(case.dtype) for shape in (*shapes, (kv_heads, case.head_dim))]
    options = {
        "chunk_size": case.chunk_size,
        "routing_scale": 12.0,
        "prior_normalizer": case.normalizer,
        "prior_temperature": 1.5,
        "document_starts": starts,
    }
    if case.routing_block > 1:
        means = router_queries(tensors[0], starts, (0,), case.routing_block, case.routing_block // 2 + 3)
        options |= {"routing_block": case.routing_block, "router_q": means}
    return tensors, options


def in_float64(options: dict[str, Any]) -> dict[str, Any]:
    """The options with what floats in them as exact."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def error_against_reference(tensors: list[Tensor], options: dict[str, Any]) -> tuple[float, DashStats, DashStats]:
    """Of Triton's output against the float64 reference on Triton's own support; both backends' statistics."""
    out, stats = dash_attention(*tensors, **options, backend="triton", return_stats=True)
    exact = [t.double() for t in tensors]
    support = stats.support()
    expected, truth = dash_attention(
        *exact, **in_float64(options), backend="reference", support=support, return_stats=True
    )
    return relative_error(out, expected), stats, truth


def gradient_errors(tensors: list[Tensor], options: dict[str, Any]) -> dict[str, float]:
    """Of Triton's output and gradients against the float64 reference on Triton's own support, relative.

    With router_q among the options also of its gradient.

    A chunk query without influence (a row of one chunk) has a gradient of exactly zero: its error is its norm.
    """
    inputs = dict(zip(("q", "k", "v", "chunk_query"), tensors, strict=True))
    if "router_q" in options:
        inputs["router_q"] = options["router_q"]
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, stats = dash_attention(**options | inputs, backend="triton", return_stats=True)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = dash_attention(**options | exact, backend="reference", support=stats.support())
    truth = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    errors = {"out": relative_error(out, expected)}
    for name, gradient, correct in zip(inputs, gradients, truth, strict=True):
        assert gradient.dtype == out.dtype
        errors[name] = relative_error(gradient, correct) if correct.any() else gradient.double().norm().item()
    return errors


def in_processes(function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """function(argument) of each, on all GPUs, by many processes: most of it is compiling.

    At most 9 processes share a GPU: where kernels spill (fp32, head_dim 256) each takes 4 to 7 GiB. Triton's cache on
    disk keeps what they compiled. Fresh memory holds NaN and huge integers.
    """
    workers = min(os.cpu_count() or 1, 9 * torch.cuda.device_count())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        return list(pool.map(function, arguments))


def _start_worker() -> None:
    number = multiprocessing.current_process()._identity[0]
    torch.cuda.set_device(number % torch.cuda.device_count())
    torch.use_deterministic_algorithms(True, warn_only=True)
