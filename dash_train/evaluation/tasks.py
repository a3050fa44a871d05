"""The list of tasks, and what becomes of a task's result."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from dash_train.evaluation import loss_by_position, needle
from dash_train.evaluation.subject import Subject

TASKS: dict[str, Any] = {"loss": loss_by_position, "needle": needle}


def evaluate(subject: Subject, name: str, args: Namespace, out: Path) -> None:
    """Run a task: write `out`/NAME.json and NAME.png, print the table.

    Raises:
        UserError: an option does not fit the model or the text.
    """
    from matplotlib.figure import Figure
    from rich.console import Console

    task = TASKS[name]
    result = {"task": name, "model": str(args.model), "text": str(args.text or "validation"), **task.run(subject, args)}
    json_path, figure_path = out / f"{name}.json", out / f"{name}.png"
    out.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    task.draw(result, figure)
    figure.suptitle(f"{args.model}, {subject.decoding.mode}")
    figure.savefig(figure_path)
    Console().print(task.table(result))
    print(f"{json_path} and {figure_path.name}")
