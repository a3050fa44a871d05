"""Speed of training: whole optimizer steps of a recipe's model, Dash or full attention, and of transformers' Llama.

Needs no data: the rows are made up. Each column has the GPU to itself, and ours stands right before its peer.
"""

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from dash_train.benchmark.inputs import Rows, mean, rows_with_locality, set_density
from dash_train.benchmark.peer import Peer, PeerOptimizer, peer_attention
from dash_train.benchmark.report import markdown_table, write_json
from dash_train.benchmark.timing import Phases
from dash_train.distributed.world import World, init_world, join_context
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.recipe.schema import Recipe
from dash_train.training.engine import build_engine, deepspeed_config
from dash_train.training.garbage import frozen_heap
from dash_train.training.initial import DTYPES, build_model, resolve_model
from dash_train.training.step import optimizer_step, to_device
from dash_train.training.throughput import Throughput
from dash_train.training.totals import Totals

LR = 1e-6  # nothing shall be learned: the density is to stay where it was set
WARM_UP_MICRO_BATCHES = 2  # the second accumulates
KEPT_GB = 0.5  # libraries' workspaces stay
MICRO_BATCH_TOKENS = 32768  # with fewer the GPU waits for the host
DENSE_SEQ = 8192  # up to here groups of 8 heads do not reach a density of .10
PHASES = ("data", "forward", "backward", "optimizer")
TABLE = {
    "seq": "tokens a row|,",
    "what": "",
    "tokens_per_second_per_gpu": "tokens/s per GPU|,.0f",
    "over_peer": "over the peer|.2f",
    "mfu": "MFU, dense|.1%",
    "attended_mfu": "MFU, attended|.1%",
    "memory_gb": "peak memory, GB|.1f",
    **{f"{phase}_s": f"{phase}, s|.3f" for phase in PHASES},
    "density": "density|.3f",
    "union_factor": "U|.2f",
    "error": "",
}

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py train`. Lists are separated by commas."""
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the recipe's")
    parser.add_argument(
        "--recipe",
        default="recipes/1b-128k.yaml",
        help="recipe of the model, its optimizer and its savings of memory (default: %(default)s)",
    )
    parser.add_argument(
        "--seq",
        type=_integers,
        default=[131072],
        help="tokens of a row, one length or several, separated by commas (default: 131072)",
    )
    parser.add_argument(
        "--attention",
        type=_words("dash", "full"),
        default=["dash"],
        help="attention of the layers: dash, full or both, separated by commas (default: dash)",
    )
    parser.add_argument(
        "--density",
        type=float,
        help="share of the eligible chunks that a token is routed to (default: .10; .25 up to 8192 tokens and on text)",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        help="how often each random token id stands in a row (default: searched, so that U is 1.2 to 1.4)",
    )
    parser.add_argument(
        "--text", action="store_true", help="rows of the standard library's bytes in place of random ids"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="steps that are timed, after a short one that is not (default: %(default)s)",
    )
    parser.add_argument("--no-warm-up", action="store_true", help="time the first step too, where a step takes minutes")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        help="rows at a time, ours and the peer's (default: as many as hold 32768 tokens)",
    )
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=131072,
        help="tokens of a step and GPU, at least a micro-batch (default: %(default)s)",
    )
    parser.add_argument(
        "--peer", choices=["huggingface"], help="time transformers' Llama of the same shape beside ours"
    )
    parser.add_argument(
        "--peer-precision",
        type=_words("fp32-master", "bf16"),
        default=["fp32-master"],
        help="precision of the peer's weights and moments, one or both, separated by commas (default: fp32-master)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every row of `launch/benchmark.py train`. Those done so far are always in the JSON file.

    Raises:
        UserError: the recipe is wrong, or a peer was asked for on several ranks.
    """
    world = init_world()
    if args.peer and world.size > 1:
        raise UserError(f"--peer {args.peer}: the peer runs on one GPU, not on {world.size}")
    peers = args.peer_precision if args.peer else []
    rows: list[dict[str, Any]] = []
    for seq in args.seq:
        for column in (*args.attention, *peers):
            rows.append(_row(args, seq, column, world))
            _compare_with_peer(rows)
            if world.is_main:
                print(_sentence(rows[-1]), flush=True)
                if args.json:
                    write_json(args.json, args, {"rows": rows})
    if world.is_main:
        print("\n" + markdown_table(TABLE, rows))
    return {"rows": rows}


class Trainee(Protocol):
    """A model and its optimizer, ours or the peer's."""

    def step(self, micro_batches: Iterator[dict[str, Tensor]], count: int, totals: Totals) -> Phases:
        """One optimizer step of `count` micro-batches; its phases."""

    def close(self) -> None:
        """Undo what would keep its tensors alive."""


class Ours:
    """The engine and the step of the trainer."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        config, self.context = deepspeed_config(recipe, world.size), join_context(world, recipe.parallel)
        model = build_model(recipe, None, config, world.device, self.context)
        self.world, self.engine = world, build_engine(model, recipe, config)

    def step(self, micro_batches: Iterator[dict[str, Tensor]], count: int, totals: Totals) -> Phases:
        phases = Phases(self.world.device)
        phases.enter("data")
        batch = list(islice(micro_batches, count))
        optimizer_step(self.engine, batch, self.world, self.context, totals, phases.enter)
        return phases

    def close(self) -> None:
        self.engine.destroy()


class Theirs:
    """transformers' Llama, trained in a plain loop."""

    def __init__(self, recipe: Recipe, precision: str, device: torch.device) -> None:
        self.config, self.device = recipe.model, device
        self.model = Peer(recipe.model, max_seq=recipe.train.seq, dtype=DTYPES[recipe.train.precision], device=device)
        self.optimizer = PeerOptimizer(self.model, recipe.optimizer, precision)

    def step(self, micro_batches: Iterator[dict[str, Tensor]], count: int, totals: Totals) -> Phases:
        phases = Phases(self.device)
        phases.enter("data")
        batch = list(islice(micro_batches, count))
        with peer_attention(self.config, self.device):
            for micro in batch:
                phases.enter("forward")
                loss = self.model(**to_device(micro, self.device)) / (count * _counted_tokens(micro))
                phases.enter("backward")
                loss.backward()
        phases.enter("optimizer")
        self.optimizer.step()
        return phases

    def close(self) -> None:
        """There is nothing."""


def _row(args: argparse.Namespace, seq: int, column: str, world: World) -> dict[str, Any]:
    """One length of one column; running out of memory is a result too."""
    is_ours = column in ("dash", "full")
    micro_batch_size = args.micro_batch_size or max(1, MICRO_BATCH_TOKENS // seq)
    micro_batches = max(1, args.step_tokens // (seq * micro_batch_size))
    rows_a_step = micro_batches * micro_batch_size * world.size
    recipe = _recipe(args, seq, micro_batch_size, rows_a_step, column if is_ours else "full")
    row: dict[str, Any] = {"seq": seq, "what": f"ours, {column}" if is_ours else f"{args.peer}, {column}"}
    trainee: Trainee | None = None
    try:
        if is_ours:
            trainee = Ours(recipe, world)
            rows = _dash_rows(args, trainee, recipe, world) if column == "dash" else _plain_rows(args, recipe)
        else:
            trainee, rows = Theirs(recipe, column, world.device), _plain_rows(args, recipe)
        row["repeat"] = rows.repeat
        warm_up = 0 if args.no_warm_up else min(micro_batches, WARM_UP_MICRO_BATCHES)
        row |= _measure(trainee, rows, recipe, world, micro_batches, args.steps, warm_up)
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    if trainee is not None:
        trainee.close()
    trainee = None
    _free_memory(world.device)
    return row


def _recipe(args: argparse.Namespace, seq: int, micro_batch_size: int, rows: int, attention: str) -> Recipe:
    fixed = {
        "train.seq": seq,
        "train.micro_batch_size": micro_batch_size,
        "train.global_batch_size": rows,
        "optimizer.lr": LR,
        "model.attention.type": attention,
    }
    recipe = load_recipe(args.recipe, [*args.overrides, *(f"{key}={value}" for key, value in fixed.items())])
    return resolve_model(recipe, None, recipe.model.vocab_size or recipe.data.tokenizer.vocab_size)


def _plain_rows(args: argparse.Namespace, recipe: Recipe) -> Rows:
    assert recipe.model.vocab_size is not None
    return Rows(recipe.train.seq, recipe.model.vocab_size, args.repeat or 1, args.text, recipe.train.micro_batch_size)


def _dash_rows(args: argparse.Namespace, ours: Ours, recipe: Recipe, world: World) -> Rows:
    """Rows on which the model, its routing scales now set, has the wanted density."""
    seq, model = recipe.train.seq, ours.engine.module
    density = args.density or (0.25 if args.text or seq <= DENSE_SEQ else 0.10)
    if not (args.text or args.repeat):
        return rows_with_locality(model, seq, recipe.train.micro_batch_size, density, world.device)
    rows = _plain_rows(args, recipe)
    set_density(model, rows, density, world.device)
    return rows


def _measure(
    trainee: Trainee, rows: Rows, recipe: Recipe, world: World, micro_batches: int, steps: int, warm_up: int
) -> dict[str, Any]:
    """Medians over the timed steps; the router's statistics over all of them."""
    device = world.device
    shared = recipe.parallel.context  # ranks that share a row
    batches = rows.micro_batches(world.rank // shared)
    _reset_peak_memory(device)
    if warm_up:
        trainee.step(batches, warm_up, Totals(recipe.model.layers, recipe.model.kv_heads, device)).seconds()

    totals = Totals(recipe.model.layers, recipe.model.kv_heads, device)
    seconds, phases = [], []
    with frozen_heap():
        for _ in range(steps):
            started = time.perf_counter()
            phases.append(trainee.step(batches, micro_batches, totals).seconds())
            seconds.append(time.perf_counter() - started)
    totals.reduce()
    layers = totals.per_layer()
    throughput = Throughput(recipe.model, recipe, device, world.size)
    tokens = recipe.train.global_batch_size * rows.seq // shared
    return {
        **throughput.measure(tokens, statistics.median(seconds), layers["routed_chunks"]),
        **{f"{phase}_s": statistics.median(step[phase] for step in phases) for phase in PHASES},
        "step_seconds": seconds,
        "density": mean(layers["density"]),
        "union_factor": mean(layers["union_factor"]),
        "density_per_layer": layers["density"],
        "union_factor_per_layer": layers["union_factor"],
    }


def _compare_with_peer(rows: list[dict[str, Any]]) -> None:
    """Give our rows of the last length their speed over the peer of equal arithmetic, once it is known."""
    peer = rows[-1]
    if not peer["what"].endswith("fp32-master") or "error" in peer:
        return
    for row in rows:
        if row["seq"] == peer["seq"] and "error" not in row:
            row["over_peer"] = row["tokens_per_second_per_gpu"] / peer["tokens_per_second_per_gpu"]


def _sentence(row: dict[str, Any]) -> str:
    start = f"{row['what']}, {row['seq']:,} tokens: "
    if "error" in row:
        return start + row["error"]
    text = start + f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s, {row['memory_gb']:.1f} GB"
    for name, key in (("density", "density_per_layer"), ("U", "union_factor_per_layer")):
        if None not in row[key]:
            text += f"; {name} per layer {' '.join(f'{value:.2f}' for value in row[key])}"
    return text


def _counted_tokens(batch: dict[str, Tensor]) -> int:
    """All but the last of every row."""
    rows, seq = batch["tokens"].shape
    return rows * (seq - 1)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated(device) / 1e9
    if left > KEPT_GB:  # seen with DeepSpeed's stages 1 and 3, whose hooks make cycles that nothing collects
        logger.warning("%.1f GB of this column were not freed: the next one has less, and its peak counts them", left)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(*choices: str) -> Any:
    """A parser of a comma-separated list of some of `choices`."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(choices):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected a list of {', '.join(choices)}")
        return words

    return parse
