import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dash_train.benchmark import coverage
from dash_train.benchmark.captured import QUERIES, capture, captured_problems
from dash_train.benchmark.populations import make_problem

ROOT = Path(__file__).parents[2]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    coverage.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--chunk-size", "16", *options])


def test_synthetic_cells(capsys):
    """Uniform logits are sampled and covered; a needle is found with bounds, often missed without."""
    args = arguments("--context", "4096", "--pairs", "96", "--populations", "uniform", "needle", "--base-sample", "128")
    cells = coverage.run(args)["cells"]
    assert len(cells) == 2 * 2 * 2 * 3
    found = {(c["population"], c["verify"], c["bounds"], c["epsilon"]): c for c in cells}
    uniform = found["uniform", "output", False, 0.1]
    assert uniform["verdict"] == "covered" and uniform["fallbacks"] == 0 and 0.05 < uniform["density"] < 0.5
    assert found["needle", "output", False, 0.1]["verdict"] == "NOT covered"
    assert found["needle", "output", True, 0.1]["verdict"] == "covered"
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(cells) + 2 and len({line.count("|") for line in table[1:]}) == 1


def test_needles_hold_a_fifth_of_the_softmax():
    problem = make_problem("needle", 2, 1024, 4, 32, 16, 0.1, torch.Generator().manual_seed(0))
    logits = torch.einsum("bhd,btd->bht", problem.q, problem.k[:, :, 0]) * 32**-0.5
    assert (logits.softmax(-1).amax(-1) - 0.2).abs().max() < 0.08


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_captured_attention_is_the_models_own(tiny_model, tmp_path, attention):
    """Exact attention over the captured tensors equals what the layer computes for the same tokens."""
    model = tiny_model(attention)
    seen = []
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    tokens = torch.randint(64, (640,))
    capture(model, tokens, tmp_path / "captured.safetensors", contexts=(640,))
    tensors = load_file(tmp_path / "captured.safetensors")
    assert len(tensors) == 2 * (6 if attention == "dash" else 4)
    [(name, problems)] = captured_problems(tmp_path / "captured.safetensors", "cpu", QUERIES)
    assert name == "context 640"
    for problem, output in zip(problems, seen, strict=True):
        _, expected, _ = coverage.exact(problem, "output", arguments())
        torch.testing.assert_close(expected.flatten(1), output[problem.lengths.long() - 1], rtol=1e-4, atol=1e-5)


def test_command(tiny_model, tmp_path):
    capture(tiny_model("dash"), torch.randint(64, (640,)), tmp_path / "captured.safetensors", contexts=(640,))
    command = [
        sys.executable,
        ROOT / "launch/benchmark.py",
        "coverage",
        "--captured",
        tmp_path / "captured.safetensors",
    ]
    command += ["--chunk-size", "16", "--base-sample", "64", "--device", "cpu", "--json", tmp_path / "row.json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    cells = json.loads((tmp_path / "row.json").read_text())["cells"]
    assert len(cells) == 12 and all(cell["pairs"] == 2 * 4 * QUERIES for cell in cells)
