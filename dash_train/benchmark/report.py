"""Results of a benchmark as JSON, for people and programs that read them later."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from dash_train.tracking.environment import environment

NOT_ARGUMENTS = ("json", "debug", "local_rank")


def write_json(path: Path, args: Namespace, result: dict[str, Any]) -> None:
    """Write the command's arguments, what it ran on and its result."""
    arguments = {name: value for name, value in vars(args).items() if name not in NOT_ARGUMENTS}
    path.write_text(
        json.dumps({"arguments": arguments, "environment": environment(), **result}, indent=2, default=str) + "\n"
    )


def markdown_table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """A table of `rows`: `columns` maps each key to its heading and its format, "heading|format"."""
    headings = [heading.partition("|")[0] for heading in columns.values()]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        lines.append([_cell(row.get(key), heading.partition("|")[2]) for key, heading in columns.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else str(value or "")
