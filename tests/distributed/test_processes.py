"""Runs as a user starts them: by the launcher, on several ranks, killed and resumed, with bad input."""

import signal
import sys
import time
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, run, start, write_recipe

from dash_train.command import run_command
from dash_train.distributed import signals
from dash_train.tracking.metrics import read_metrics
from dash_train.training.checkpoint import load_weights, newest

COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "epoch", "rows_hash", "density")


def lines(folder, keys=COMPARED):
    return [{key: line[key] for key in keys} for line in read_metrics(folder)[0]]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Who starts the tests in the background lets them, and what they start, ignore Ctrl-C and a hang-up."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, corpus):
    """The training lines of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    result = run("pretrain.py", write_recipe(folder / "recipe.yaml", corpus))
    assert result.returncode == 0, result.stderr
    return lines(folder / "run")


@pytest.mark.parametrize(
    ("stage", "context", "checkpointing"), [(1, 1, "none"), (3, 1, "selective"), (3, 2, "selective")]
)
def test_two_ranks_train_like_one(tmp_path, corpus, whole_run, stage, context, checkpointing):
    partition = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    changes = {"train__activation_checkpointing": checkpointing, "deepspeed": partition}
    changes["parallel"] = {"zero_stage": stage, "context": context}
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, **changes)
    result = run("pretrain.py", recipe, ranks=2)
    assert result.returncode == 0, result.stderr
    two = lines(tmp_path / "run")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in whole_run], abs=1e-4)
    for one_line, line in zip(whole_run, two, strict=True):
        assert line["density"] == pytest.approx(one_line["density"], abs=2e-3)
        assert (line["rows_hash"], line["tokens"]) == (one_line["rows_hash"], one_line["tokens"])


def test_bf16_weights_are_gathered_from_the_shards_of_two_ranks(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, train__precision="bf16", parallel={"zero_stage": 1})
    result = run("pretrain.py", recipe, "train.steps=2", ranks=2)
    assert result.returncode == 0, result.stderr
    found = newest(tmp_path / "run" / "checkpoints")
    weights = load_weights(found)
    files = [load_file(found / f"rank-0000{rank}.safetensors") for rank in (0, 1)]
    assert {len(file) > 0 for file in files} == {True}, "each rank has its part"
    parts = {name: [file[key] for file in files if (key := f"weight/{name}") in file] for name in weights}
    assert sum(len(part) for part in parts.values()) > len(weights) - 1, "one parameter is cut in two"
    for name, weight in weights.items():
        whole = torch.cat(parts[name]) if parts[name] else torch.cat(parts["model.embed_tokens.weight"])
        assert weight.dtype == torch.float32 and torch.equal(weight.flatten(), whole), name


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, corpus, whole_run):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus)
    process = start("pretrain.py", recipe)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run("pretrain.py", recipe).returncode == 0
    assert lines(tmp_path / "run") == whole_run


def test_sigterm_leaves_one_complete_checkpoint_and_a_clean_exit(tmp_path, corpus, whole_run):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, checkpoint__every=100)
    process = start("pretrain.py", recipe)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert newest(tmp_path / "run" / "checkpoints") == saved
    assert f"stopped by SIGTERM after step {int(saved.name[5:])}" in stderr
    assert int(saved.name[5:]) < 6
    assert run("pretrain.py", recipe).returncode == 0
    assert lines(tmp_path / "run") == whole_run


def test_ctrl_c_saves(tmp_path, corpus):
    options = {"checkpoint__every": 10000, "train__steps": 10000, "train__validate_every": 0}
    process = start("pretrain.py", write_recipe(tmp_path / "recipe.yaml", corpus, **options))
    wait_for_step(tmp_path / "run", 2, process)
    for _ in range(2):  # within a second: `timeout -s INT` does so
        process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()  # it has many steps to go
    assert process.returncode == 0 and "stopped by SIGINT after step" in stderr, stderr
    assert newest(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_stop_flag_hears_signals(number, monkeypatch):
    """Before the first step there is nothing to save; a second Ctrl-C ends the process at once."""
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.0)
    with closing(signals.StopFlag()) as flag:
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(number)
        assert stopped.value.code == 0
        flag.training = True
        signal.raise_signal(number)
        assert flag.received == signal.Signals(number).name
        assert ended == ([130] if number == signal.SIGINT else [])
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def wait_for_step(run_dir, step, process):
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + 120
    while not (
        (run_dir / "metrics.jsonl").exists() and f'"step": {step}, "loss"' in (run_dir / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__stepz": 1}, "train.stepz: unknown key; did you mean train.steps?"),
        ({"data__sources": [{"type": "text", "path": "/nowhere/*.txt"}]}, "/nowhere/*.txt: no text file here"),
        ({"init__from": "/nowhere"}, "init.from: /nowhere: expected a run folder"),
        ({"parallel__zero_stage": 9}, "parallel.zero_stage: should be 0, 1, 2 or 3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, corpus, capsys, monkeypatch, changes, message):
    sys.path.insert(0, str(ROOT / "launch"))
    monkeypatch.setattr(sys, "path", sys.path)
    import pretrain

    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, **changes)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(recipe)])
    with pytest.raises(SystemExit) as stopped:
        run_command(pretrain.main, pretrain.recipe_parser(""))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_the_launcher_passes_the_exit_code_on(tmp_path, corpus):
    result = run("pretrain.py", write_recipe(tmp_path / "recipe.yaml", corpus, train__stepz=1), ranks=1)
    assert result.returncode == 2
    assert "did you mean train.steps?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_traceback_is_there_on_demand(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, train__stepz=1)
    assert "Traceback" in run("pretrain.py", recipe, "--debug").stderr
