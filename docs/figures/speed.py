"""Draws speed against length from docs/results: python docs/figures/speed.py [FOLDER]

Left: training on plain text, ours and the peer's tokens/s (rows of training.json whose `kind` is "text"). Right: one
attention layer against cuDNN, forward and backward (rows of attention.json with routing blocks and 32/2 heads).
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent
RESULTS = FIGURES.parent / "results"
OURS, PEER, DENSITIES = "#2f6fbb", "#7b8794", ("#1f2933", "#3a9a68", "#e0a030")
Line = list[tuple[int, float]]


def lines() -> dict[str, dict[str, Line]]:
    """The points of both panels: label -> [(tokens, value), ...]."""
    text = [row for row in _rows("training") if row["kind"] == "text"]
    layer = [row for row in _rows("attention") if row.get("routing_block", 1) > 1 and row["shape"].endswith("32/2")]
    densities = sorted({_round(row) for row in layer if _round(row) < 0.5})
    return {
        "training": {
            "DashTrain": sorted((row["tokens"], row["ours"]) for row in text),
            "transformers + Liger": sorted((row["tokens"], row["peer"]) for row in text),
        },
        "attention": {
            f"density {density:.2f}": sorted((row["tokens"], row["both_x"]) for row in layer if _round(row) == density)
            for density in densities
        },
    }


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def _round(row: dict[str, Any]) -> float:
    return round(row["density"], 2)


def fingerprint() -> str:
    """What the figure was drawn from: its points and this script. Fonts and matplotlib's version do not enter."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return json.dumps({"script": source, **lines()})


def draw(path: Path) -> None:
    """Write the SVG; its description is the fingerprint."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.family": "sans-serif"})
    figure, (training, attention) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.15, top=0.88, wspace=0.22)
    points = lines()
    for (label, line), color in zip(points["training"].items(), (OURS, PEER), strict=True):
        training.plot(*zip(*line, strict=True), "o-", color=color, label=label)
    for (tokens, ours), (_, peer) in zip(*points["training"].values(), strict=True):
        training.annotate(f"{ours / peer:.1f}x", (tokens, ours), (0, 7), textcoords="offset points", ha="center")
    for (label, line), color in zip(points["attention"].items(), DENSITIES, strict=False):
        attention.plot(*zip(*line, strict=True), "o-", color=color, label=label)
    attention.axhline(1, color=PEER, linewidth=1)
    highest = max(ours for _, ours in points["training"]["DashTrain"])
    training.set(title="training 1.2B on text, density .10: tokens/s", ylim=(0, 1.3 * highest))
    training.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    attention.set(title="one layer, both passes: times cuDNN's speed", yscale="log", yticks=[1, 2, 5, 10, 20])
    attention.set_yticklabels([f"{times}x" for times in (1, 2, 5, 10, 20)])
    attention.minorticks_off()
    for axis, length in ((training, 32768), (attention, 8192)):
        ticks = [tokens for tokens in (8192, 16384, 32768, 65536, 131072) if tokens >= length]
        axis.set(xscale="log", xticks=ticks, xlabel="tokens a row", xlim=(length * 0.8, 131072 * 1.25))
        axis.set_xticklabels([f"{tokens // 1024}K" for tokens in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left" if axis is attention else "upper right")
        axis.title.set_fontsize(11)
    figure.savefig(path, metadata={"Description": fingerprint(), "Date": None})


if __name__ == "__main__":
    draw((Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES) / "speed.svg")
