import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from dash_train.errors import UserError
from dash_train.tracking.comparison import compare_runs, largest_difference, window_means

ROOT = Path(__file__).parents[2]


def write_run(folder, offset=0.0, steps=45):
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 5 - step / 100 + (offset if step > 20 else 0)}
        if step % 10 == 0:
            line |= {"router_grad_norm_q": [0.3, None, 0.4], "grad_norm_chunk_query": [0.1, None, 0.2]}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_only_whole_windows_count():
    training = [{"step": step, "loss": float(step)} for step in range(1, 46)]
    assert window_means(training, 20) == {20: 10.5, 40: 30.5}
    assert largest_difference({20: 1.0, 40: 2.0}, {40: 2.5, 60: 9.0}) == 0.5
    assert math.isnan(largest_difference({20: 1.0}, {40: 2.0}))


def test_the_command_says_how_far_runs_are_apart(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", 0.015), write_run(tmp_path / "three", -0.03)]
    out = tmp_path / "figure.png"
    command = [sys.executable, ROOT / "launch" / "plot.py", *runs, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one and two: means of 20 steps differ by at most 0.0150" in done.stdout
    assert "two and three: means of 20 steps differ by at most 0.0450" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        compare_runs([write_run(tmp_path / "one"), tmp_path / "two"], 20, tmp_path / "figure.png")
