import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dash_train.benchmark import captured, coverage
from dash_train.benchmark.captured import QUERIES, capture, captured_layers, captured_problems
from dash_train.benchmark.populations import make_problem
from dash_train.errors import UserError

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


def test_sketch_cells():
    """The sketch finds a needle that neither summaries nor page bounds show; there are always bounds."""
    options = ("--context", "2048", "--pairs", "64", "--populations", "hidden-needle", "--head-dim", "32")
    cells = coverage.run(arguments(*options, "--sampler", "sketch", "--base-sample", "64"))["cells"]
    assert len(cells) == 2 * 3 and all(cell["bounds"] and 0.04 < cell["sketch"] < 0.0625 for cell in cells)
    assert all(cell["verdict"] == "covered" for cell in cells if cell["epsilon"] == 0.1)
    uniform = coverage.run(arguments(*options, "--base-sample", "64"))["cells"]
    assert not any(cell["sketch"] for cell in uniform)
    found = [cell for cell in uniform if cell["epsilon"] == 0.1 and not cell["bounds"]]
    assert len(found) == 2 and all(cell["verdict"] == "NOT covered" for cell in found)


@pytest.mark.parametrize("name", ["needle", "hidden-needle"])
def test_needles_hold_a_fifth_of_the_softmax(name):
    problem = make_problem(name, 2, 1024, 4, 32, 16, 0.1, torch.Generator().manual_seed(0))
    logits = torch.einsum("bhd,btd->bht", problem.q, problem.k[:, :, 0]) * 32**-0.5
    assert (logits.softmax(-1).amax(-1) - 0.2).abs().max() < 0.08


@pytest.mark.parametrize(
    ("attention", "routing"),
    [("full", {}), ("dash", {}), ("mixed", {}), ("dash", {"routing_block": [1, 8], "routing_window": [4, 40]})],
)
def test_captured_attention_is_the_models_own(tiny_model, tmp_path, attention, routing):
    """Exact attention over the captured tensors equals what the layer computes for the same tokens."""
    model, path = tiny_model(attention, routing=routing), tmp_path / "captured.safetensors"
    seen = []
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    capture(model, torch.randint(64, (2, 640)), path)
    assert len(load_file(path)) == {"full": 6, "mixed": 7, "dash": 8}[attention]

    for inputs, output in zip(captured_layers(path, "cpu"), seen, strict=True):
        if inputs.routing:
            torch.testing.assert_close(inputs.dash_attention().flatten(2), output)
    [(name, problems)] = captured_problems(path, "cpu", QUERIES)
    assert name == "context 640"
    for problem, output in zip(problems, torch.cat(seen), strict=True):
        _, expected, _ = coverage.exact(problem, "output", arguments())
        torch.testing.assert_close(expected.flatten(1), output[problem.lengths.long() - 1], rtol=1e-4, atol=1e-5)


def test_capture_reads_rows_of_a_text(tiny_model, tmp_path, monkeypatch):
    tokenizer = argparse.Namespace(encode=lambda text: [ord(letter) % 64 for letter in text])
    trained = argparse.Namespace(model=tiny_model("dash"), tokenizer=tokenizer)
    monkeypatch.setattr(captured, "load_trained", lambda path: trained)
    text, out = tmp_path / "text", tmp_path / "captured.safetensors"
    text.write_text("chunks of text " * 20)
    parser = argparse.ArgumentParser()
    captured.add_arguments(parser)
    options = ["--model", "run", "--text", str(text), "--rows", "3", "--out", str(out), "--seq"]
    captured.run(parser.parse_args([*options, "96"]))
    assert [inputs.q.shape for inputs in captured_layers(out, "cpu")] == [(3, 96, 4, 16)] * 2
    with pytest.raises(UserError, match="holds 300 tokens, expected at least --rows x --seq = 384"):
        captured.run(parser.parse_args([*options, "128"]))


def test_command(tiny_model, tmp_path):
    capture(tiny_model("dash"), torch.randint(64, (1, 640)), tmp_path / "captured.safetensors")
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
