"""metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run loses nothing.

Training lines hold `step`, `loss`, `lr`, `grad_norm`, ...; validation lines `step`, `validation_loss`, .... A resumed
run takes some steps again and appends their lines again: readers take the last line of a step.
"""

import json
import math
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
KINDS = {"loss", "validation_loss"}


class MetricsFile:
    """Appends to a run's metrics.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / FILE
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a")
        if torn:  # the process died in the middle of a line
            self._file.write("\n")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: the loss and gradient norm of a skipped step become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training lines and the validation lines of a run, ordered by step, the last line of each step.

    A torn line (the process died while writing it) or a damaged one is left out.
    """
    training: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for line in (run_dir / FILE).read_bytes().splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict) or type(values.get("step")) is not int or not KINDS & values.keys():
            continue
        (validation if "validation_loss" in values else training)[values["step"]] = values
    return [training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)]
