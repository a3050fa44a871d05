"""The figure of a run, from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from dash_train.errors import UserError
from dash_train.tracking.metrics import FILE, read_metrics

PANELS = (
    ("loss", "nats per token"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens/s"),
)


def plot_run(run_dir: Path, out: Path | None = None) -> Path:
    """Draw loss, lr, grad norm, tokens/s and the density of each layer to one PNG (default: RUN/loss.png).

    Raises:
        UserError: the run has no metrics yet.
    """
    training = read_training(run_dir)
    validation = read_metrics(run_dir)[1]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7), constrained_layout=True)
    panels = axes.flatten()
    steps = [line["step"] for line in training]
    for axis, (key, label) in zip(panels, PANELS, strict=False):
        axis.plot(steps, [line[key] for line in training], linewidth=1)
        axis.set(title=key.replace("_", " "), xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    if validation:
        panels[0].plot(
            [line["step"] for line in validation],
            [line["validation_loss"] for line in validation],
            "o-",
            label="validation",
        )
        panels[0].legend()
    _plot_layers(panels[4], training, "density", "routed / eligible chunks")
    _plot_layers(panels[5], training, "union_factor", "U(64/G)")
    figure.suptitle(str(run_dir))
    out = out or run_dir / "loss.png"
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def read_training(run_dir: Path) -> list[dict[str, Any]]:
    """The training lines of a run, at least one.

    Raises:
        UserError: there is none yet.
    """
    if not (run_dir / FILE).is_file():
        raise UserError(f"{run_dir / FILE}: no such file; a run writes it from its first step on")
    training, _ = read_metrics(run_dir)
    if not training:
        raise UserError(f"{run_dir / FILE}: holds no training step yet")
    return training


def _plot_layers(axis: Any, training: list[dict[str, Any]], key: str, label: str) -> None:
    """One line per layer that routes, from the first (dark) to the last (light)."""
    from matplotlib import colormaps

    steps = [line["step"] for line in training]
    layers = [layer for layer, value in enumerate(training[-1][key]) if value is not None]
    for layer in layers:
        shade = colormaps["viridis"](layer / max(len(training[-1][key]) - 1, 1))
        axis.plot(steps, [line[key][layer] for line in training], linewidth=1, color=shade, label=f"layer {layer}")
    axis.set(title=f"{key.replace('_', ' ')} per layer", xlabel="step", ylabel=label)
    axis.grid(alpha=0.3)
    if 0 < len(layers) <= 12:
        axis.legend(fontsize=7)
