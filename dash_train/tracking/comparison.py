"""Several runs side by side: how far their losses are apart, and a figure."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from dash_train.errors import UserError
from dash_train.tracking.plot import read_training

ROUTER_NORMS = ("router_grad_norm_q", "grad_norm_chunk_query")


def window_means(training: list[dict[str, Any]], window: int) -> dict[int, float]:
    """Mean loss of steps 1 to `window`, of the next `window`, ..., by the last step of each whole window."""
    losses: dict[int, list[float]] = {}
    for line in training:
        losses.setdefault(-(-line["step"] // window) * window, []).append(line["loss"])
    return {end: sum(values) / window for end, values in losses.items() if len(values) == window}


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two runs' window means over the windows that both have; NaN when there is none."""
    return max((abs(one[end] - other[end]) for end in one.keys() & other.keys()), default=math.nan)


def compare_runs(run_dirs: list[Path], window: int, out: Path) -> list[str]:
    """Draw the runs' losses, the differences to the first one and the router's gradient norms to one PNG.

    Returns one line for each pair of runs: the largest difference of their means over `window` steps.

    Raises:
        UserError: a run has no metrics yet.
    """
    runs = {run_dir.name: read_training(run_dir) for run_dir in run_dirs}
    if len(runs) < len(run_dirs):
        raise UserError("two runs of the same name; rename one of the folders")
    means = {name: window_means(training, window) for name, training in runs.items()}
    _draw(runs, means, window, out)
    sentences = []
    for one, other in combinations(means, 2):
        gap = largest_difference(means[one], means[other])
        sentences.append(f"{one} and {other}: means of {window} steps differ by at most {gap:.4f}")
    return sentences


def _draw(runs: dict[str, list[dict[str, Any]]], means: dict[str, dict[int, float]], window: int, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((loss, difference), (router, chunk_query)) = pyplot.subplots(
        2, 2, figsize=(12, 8), constrained_layout=True
    )
    first, *others = means
    for name, training in runs.items():
        (line,) = loss.plot([row["step"] for row in training], [row["loss"] for row in training], linewidth=0.4)
        loss.plot(list(means[name]), list(means[name].values()), color=line.get_color(), label=name)
    for name in others:
        ends = sorted(means[first].keys() & means[name].keys())
        gaps = [means[name][end] - means[first][end] for end in ends]
        difference.plot(ends, gaps, "o-", markersize=3, color=f"C{others.index(name) + 1}", label=f"{name} - {first}")
    for axis, key in ((router, ROUTER_NORMS[0]), (chunk_query, ROUTER_NORMS[1])):
        for name, training in runs.items():
            measured = [row for row in training if key in row]
            norms = [math.hypot(*(norm for norm in row[key] if norm is not None)) for row in measured]
            axis.plot([row["step"] for row in measured], norms, label=name)
        axis.set(yscale="log")
    titles = (
        "loss",
        f"difference of {window}-step means",
        "gradient of q through the router",
        "gradient of chunk_query",
    )
    units = ("nats per token", "nats per token", "norm over all layers", "norm over all layers")
    for axis, title, unit in zip((loss, difference, router, chunk_query), titles, units, strict=True):
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
