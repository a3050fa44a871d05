"""How often the error of vAttention exceeds epsilon: its guarantee, measured on synthetic and on captured attention.

Prints a table in Markdown. The denominator is read off a value that only the own chunk's tokens have: the output is
then their share of it.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.benchmark.captured import captured_problems
from dash_train.benchmark.populations import POPULATIONS, Problem, make_problem
from dash_train.kernels.vattention import vattention_decode
from dash_train.kernels.vattention.checks import SAMPLERS

LEVELS = (0.1, 0.05, 0.025)  # epsilon and delta alike
MAX_FALLBACKS = 0.2  # a cell with more of them is not covered by sampling
BLOCK_ROWS = 16  # queries at once
COLUMNS = (
    *("population", "verify", "bounds", "ε = δ", "Pr(error > ε) ± 3 s.e.", "of \\|o\\|"),
    *("mean error / ε", "density", "sketch", "fallbacks", ""),
)


class Cell(NamedTuple):
    """One row of the table, but for the population."""

    verify: str
    bounded: bool
    level: float


class Outcome(NamedTuple):
    """What vAttention did for every (query, head) pair of a call, flat."""

    error: Tensor  # relative to max(|o|, c rms(v)), or of the denominator
    plain_error: Tensor  # relative to |o|
    density: Tensor
    sketch: Tensor  # bytes read of it, relative to those of all keys and values in 16 bits
    dense: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py coverage`."""
    parser.add_argument(
        "--captured",
        type=Path,
        help="measure on a model's queries, keys and values: a file that `capture` wrote; the other inputs are made up",
    )
    parser.add_argument(
        "--populations",
        nargs="+",
        choices=POPULATIONS,
        default=POPULATIONS,
        help="made-up inputs: which populations of keys and values (default: all)",
    )
    parser.add_argument(
        "--pairs", type=int, default=2048, help="made-up inputs: (query, head) pairs of a cell (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, default=32768, help="made-up inputs: keys of a query (default: %(default)s)"
    )
    parser.add_argument(
        "--heads", type=int, default=4, help="made-up inputs: query heads of the one KV head (default: %(default)s)"
    )
    parser.add_argument(
        "--head-dim", type=int, default=64, help="made-up inputs: numbers of a head (default: %(default)s)"
    )
    parser.add_argument(
        "--off-axis",
        type=float,
        default=0.1,
        help="made-up inputs: keys' spread off the query's direction, which loosens bounds (default: %(default)s)",
    )
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=SAMPLERS[0],
        help="vattention: how tokens are drawn; sketch always has page bounds (default: %(default)s)",
    )
    parser.add_argument(
        "--heavy",
        type=float,
        help="vattention: share of the chunks that is read for certain, by their summaries (default: the sampler's)",
    )
    parser.add_argument(
        "--base-sample",
        type=int,
        default=512,
        help="vattention: tokens of the first sample, which estimates the variance (default: %(default)s)",
    )
    parser.add_argument(
        "--value-floor",
        type=float,
        default=0.1,
        help="vattention: errors are relative to |o|, but at least to so many rms of the values (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the made-up inputs and the samples (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to compute on (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measures every cell and prints the table."""
    if args.captured:
        sources = captured_problems(args.captured, args.device, BLOCK_ROWS)
    else:
        sources = ((name, synthetic_problems(name, args)) for name in args.populations)
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    rows = []
    for name, problems in sources:
        for row in measure(problems, args):
            rows.append({"population": name, **row})
            print(table_line(name, row), flush=True)
    return {"cells": rows}


def synthetic_problems(name: str, args: argparse.Namespace) -> Iterator[Problem]:
    """Problems with made-up inputs, as many as give args.pairs pairs."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    rows = math.ceil(args.pairs / args.heads)
    for _ in range(0, rows, BLOCK_ROWS):
        shape = (BLOCK_ROWS, args.context, args.heads, args.head_dim, args.chunk_size)
        yield make_problem(name, *shape, args.off_axis, generator)


def measure(problems: Iterator[Problem], args: argparse.Namespace) -> list[dict[str, float | str | bool]]:
    """The rows of one population, each over all of its pairs."""
    bounded = (True,) if args.sampler == "sketch" else (False, True)
    cells = [Cell(v, b, level) for v in ("output", "denominator") for b in bounded for level in LEVELS]
    outcomes: dict[Cell, list[Outcome]] = {cell: [] for cell in cells}
    for index, problem in enumerate(problems):
        targets = {verify: exact(problem, verify, args) for verify in ("output", "denominator")}
        bounds = page_bounds(problem.k, args.chunk_size)
        for cell in cells:
            seed = torch.arange(len(problem.q), device=problem.q.device) + (args.seed << 40) + index * BLOCK_ROWS
            outcomes[cell].append(outcome(problem, cell, *targets[cell.verify], seed, bounds, args))
    return [summary(cell, Outcome(*map(torch.cat, zip(*found, strict=True)))) for cell, found in outcomes.items()]


def exact(problem: Problem, verify: str, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """The values to decode with, the exact output for them, and the floor c rms(v) [rows, kv_heads, 1, 1]."""
    q, k, v, lengths, chunk_bias, _ = problem
    position = torch.arange(k.shape[1], device=k.device)
    if verify == "denominator":
        own = position >= (lengths[:, None] - 1) // args.chunk_size * args.chunk_size
        v = torch.zeros_like(v)
        v[..., 0] = own[..., None].float()
    logits = q.unflatten(1, (k.shape[2], -1)) * k.shape[3] ** -0.5 @ k.permute(0, 2, 3, 1)
    logits = logits.masked_fill((position >= lengths[:, None])[:, None, None], -torch.inf)
    members = (position < lengths[:, None])[:, None]
    if chunk_bias is not None:
        bias = chunk_bias.repeat_interleave(args.chunk_size, -1)[..., : k.shape[1]]
        logits = logits + bias[:, :, None]
        members = members & (bias > -torch.inf)
    squares = v.square().sum(-1).transpose(1, 2) * members
    rms = (squares.sum(-1) / members.sum(-1)).sqrt()
    return v, logits.softmax(-1) @ v.transpose(1, 2), args.value_floor * rms[..., None]


def outcome(
    problem: Problem,
    cell: Cell,
    v: Tensor,
    expected: Tensor,
    floor: Tensor,
    seed: Tensor,
    bounds: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> Outcome:
    """Decodes and compares."""
    out, report = vattention_decode(
        problem.q,
        problem.k,
        v,
        problem.lengths,
        epsilon=cell.level,
        delta=cell.level,
        verify=cell.verify,
        summaries=problem.summaries,
        chunk_bias=problem.chunk_bias,
        seed=seed,
        heavy=args.heavy,
        base_sample=args.base_sample,
        value_floor=args.value_floor,
        bounds=bounds if cell.bounded else None,
        chunk_size=args.chunk_size,
        sampler=args.sampler,
    )
    out = out.unflatten(1, expected.shape[1:3])
    if cell.verify == "denominator":  # out is the own chunk's share of D
        error = plain_error = (expected[..., 0] / out[..., 0] - 1).abs()
    else:
        distance, length = (out - expected).norm(dim=-1), expected.norm(dim=-1)
        error, plain_error = distance / torch.maximum(length, floor), distance / length
    whole = report.tokens_read / report.density * (4 * problem.k.shape[-1])  # bytes
    sketch = torch.zeros_like(whole) if report.sketch_bytes is None else report.sketch_bytes / whole
    read = (x[..., None].expand_as(error) for x in (report.density, sketch, report.dense_fallback.float()))
    return Outcome(*(x.flatten().cpu() for x in (error, plain_error, *read)))


def page_bounds(k: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each channel in every chunk: 2 of [rows, chunks, kv_heads, head_dim]."""
    chunks = k[:, : k.shape[1] // chunk_size * chunk_size].unflatten(1, (-1, chunk_size))
    padding = (0, 0, 0, 0, 0, -(-k.shape[1] // chunk_size) - chunks.shape[1])
    k_min, k_max = (torch.nn.functional.pad(x, padding) for x in (chunks.amin(2), chunks.amax(2)))
    return k_min, k_max


def summary(cell: Cell, found: Outcome) -> dict[str, float | str | bool]:
    """One row: rates, their standard error, and what was read."""
    pairs = len(found.error)
    rate = (found.error > cell.level).float().mean().item()
    fallbacks = found.dense.mean().item()
    allowed = cell.level + 3 * math.sqrt(cell.level * (1 - cell.level) / pairs)
    return {
        "verify": cell.verify,
        "bounds": cell.bounded,
        "epsilon": cell.level,
        "pairs": pairs,
        "rate": rate,
        "standard_error": math.sqrt(rate * (1 - rate) / pairs),
        "plain_rate": (found.plain_error > cell.level).float().mean().item(),
        "mean_error": found.error.mean().item(),
        "density": found.density.mean().item(),
        "sketch": found.sketch.mean().item(),
        "fallbacks": fallbacks,
        "verdict": "not sampled" if fallbacks > MAX_FALLBACKS else "covered" if rate <= allowed else "NOT covered",
    }


def table_line(name: str, row: dict[str, float | str | bool]) -> str:
    """The row in Markdown."""
    plain = f"{row['plain_rate']:.3f}" if row["verify"] == "output" else ""
    values = [name, row["verify"], "yes" if row["bounds"] else "no", row["epsilon"]]
    values += [f"{row['rate']:.3f} ± {3 * float(row['standard_error']):.3f}", plain]
    values += [
        f"{float(row['mean_error']) / float(row['epsilon']):.2f}",
        f"{row['density']:.3f}",
        f"{row['sketch']:.3f}",
    ]
    return "| " + " | ".join(map(str, [*values, f"{row['fallbacks']:.2f}", row["verdict"]])) + " |"
