"""What a study found: rows of its runs and variants, a table and a figure."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from dash_train.benchmark.report import markdown_table
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.load import load_recipe
from dash_train.study.runs import Run
from dash_train.tracking.comparison import window_means
from dash_train.tracking.metrics import read_metrics

WINDOWS = 50  # of a run, over which its training loss is averaged
LAST = 5  # of these windows make a run's final training loss

COLUMNS = {
    "variant": "variant",
    "seeds": "seeds",
    "validation_loss": "validation loss|.4f",
    "validation_spread": "max - min|.4f",
    "validation_difference": "to the first|+.4f",
    "training_loss": "training loss, last tenth|.4f",
    "training_difference": "to the first|+.4f",
    "density": "density|.3f",
    "union_factor": "U|.2f",
    "tokens_per_second": "tokens/s alone|,.0f",
    "parameters": "parameters|,",
    "tokens": "tokens|,",
}

Row = dict[str, Any]


def study_results(runs: list[Run], speeds: list[Run], failed: list[Run]) -> Row:
    """The variants' rows and those of all runs that are done; which failed; what they ran on."""
    rows = [run_row(run) for run in runs if run.checkpoint()]
    by_variant: dict[str, list[Row]] = {run.variant: [] for run in runs}
    for row in rows:
        by_variant[row["variant"]].append(row)
    first = next(iter(by_variant.values()))
    variants = [variant_row(name, found, first) for name, found in by_variant.items() if found]
    alone = {run.variant: _speed(run) for run in speeds if run.checkpoint()}
    for variant in variants:
        variant["tokens_per_second"] = alone.get(variant["variant"])
    return {
        "variants": variants,
        "failed": [str(run.folder) for run in failed],
        "environment": json.loads((Path(rows[0]["folder"]) / "environment.json").read_text()) if rows else None,
        "runs": rows,
    }


def run_row(run: Run) -> Row:
    """A run that is done: its final losses, what its router did, its training loss in WINDOWS means."""
    training, validation = read_metrics(run.folder)
    window = max(1, run.recipe.train.steps // WINDOWS)
    losses = window_means(training, window)
    tokens = {line["step"]: line["tokens"] for line in training}
    with torch.device("meta"):
        model = LanguageModel(load_recipe(run.folder / "recipe.yaml").model)
    return {
        "variant": run.variant,
        "seed": run.seed,
        "folder": str(run.folder),
        "command": ["launch/pretrain.py", *run.arguments],
        "validation_loss": validation[-1]["validation_loss"],
        "training_loss": mean(list(losses.values())[-LAST:]),
        "density": _mean_of_layers(validation[-1]["validation_density"]),
        "union_factor": _mean_of_layers(validation[-1]["validation_union_factor"]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": training[-1]["tokens"],
        "curve": {"tokens": [tokens[step] for step in losses], "loss": list(losses.values())},
    }


def variant_row(name: str, rows: list[Row], first: list[Row]) -> Row:
    """Means over a variant's runs; differences are to the first variant's runs with the same seeds."""
    row: Row = {"variant": name, "seeds": len(rows), **{key: rows[0][key] for key in ("parameters", "tokens")}}
    for key in ("validation_loss", "training_loss", "density", "union_factor"):
        row[key] = mean(run[key] for run in rows) if rows[0][key] is not None else None
    losses = [run["validation_loss"] for run in rows]
    row["validation_spread"] = max(losses) - min(losses)
    pairs = [(run, other) for run in rows for other in first if run["seed"] == other["seed"]]
    if pairs and rows is not first:
        for what in ("validation", "training"):
            row[f"{what}_difference"] = mean(run[f"{what}_loss"] - other[f"{what}_loss"] for run, other in pairs)
    return row


def _mean_of_layers(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return mean(numbers) if numbers else None


def _speed(run: Run) -> float:
    """Tokens/s over the second half of the steps that this run took by itself."""
    training, _ = read_metrics(run.folder)
    return median(line["tokens_per_second"] for line in training[len(training) // 2 :])


def table(results: Row) -> str:
    """The variants, in Markdown."""
    return markdown_table(COLUMNS, results["variants"])


def draw(results: Row, out: Path) -> None:
    """Training loss against tokens and its difference to the first variant, means over the seeds in a band from the
    least to the largest; the final validation losses.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, difference, validation) = pyplot.subplots(1, 3, figsize=(17, 5), constrained_layout=True)
    names = [variant["variant"] for variant in results["variants"]]
    curves = {name: {run["seed"]: run["curve"] for run in results["runs"] if run["variant"] == name} for name in names}
    reference = curves[names[0]]
    for number, name in enumerate(names):
        style = {"color": f"C{number}", "label": name}
        _band(loss, list(curves[name].values()), style)
        gaps = [
            {
                "tokens": curve["tokens"],
                "loss": [a - b for a, b in zip(curve["loss"], reference[seed]["loss"], strict=True)],
            }
            for seed, curve in curves[name].items()
            if seed in reference
        ]
        _band(difference, gaps, style)
        final = [run["validation_loss"] for run in results["runs"] if run["variant"] == name]
        validation.plot([number] * len(final), final, "o", color=style["color"], alpha=0.5)
        validation.plot(number, mean(final), "_", color=style["color"], markersize=24)
    loss.set(title="training loss", xlabel="tokens", ylabel="nats per token")
    loss.legend(fontsize=8)
    difference.set(title=f"training loss, difference to {names[0]}", xlabel="tokens", ylabel="nats per token")
    validation.set(title="validation loss at the end", ylabel="nats per token", xticks=range(len(names)))
    validation.set_xticklabels(names, rotation=30, ha="right")
    for axis in (loss, difference, validation):
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _band(axis: Any, curves: list[Row], style: dict[str, str]) -> None:
    """The mean of curves over the same tokens, and the band that they fill."""
    if not curves:
        return
    by_place = list(zip(*(curve["loss"] for curve in curves), strict=True))
    axis.plot(curves[0]["tokens"], [mean(values) for values in by_place], linewidth=1.2, **style)
    band = [min(values) for values in by_place], [max(values) for values in by_place]
    axis.fill_between(curves[0]["tokens"], *band, color=style["color"], alpha=0.15, linewidth=0)
