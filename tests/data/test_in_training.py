"""What a run makes of its data: mixtures, sources in the metrics, steps that are passed over."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ENVIRONMENT, ROOT, write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training.trainer import Trainer

Lines = list[dict[str, Any]]


@pytest.fixture
def train(tmp_path: Path, corpus: Path) -> Callable[..., tuple[Lines, Lines]]:
    """Runs a tiny recipe over two sources; returns its training and validation lines."""
    rows = "".join(json.dumps({"text": f"{number}. " + "one more row of words " * 20}) + "\n" for number in range(60))
    (tmp_path / "rows.jsonl").write_text(rows)
    sources = [{"type": "text", "path": str(corpus)}, {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}]
    data = {
        "cache": str(tmp_path / "cache"),
        "sources": sources,
        "tokenizer": {"vocab_size": 400},
        "validation_fraction": 0.2,
    }

    def run(name: str = "run", **overrides: Any) -> tuple[Lines, Lines]:
        changed = {**data, **overrides.pop("data", {})}
        quick = {
            "train__seq": 64,
            "train__micro_batch_size": 4,
            "train__global_batch_size": 4,
            "train__validation_rows": 4,
        }
        constant = {"type": "constant", "warmup_steps": 2}  # however long the run
        full = {"layers": 1, "hidden_size": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_size": 16}
        model = {**full, "attention": {"type": "full", "chunk_size": 16}}
        overrides = {"schedule": constant, "model": model, "train__validate_every": 6, **quick, **overrides}
        recipe = load_recipe(write_recipe(tmp_path / name / "recipe.yaml", corpus, data=changed, **overrides))
        Trainer(recipe).train()
        return read_metrics(tmp_path / name / "run")

    return run


STAGED = {"weight_by": "tokens", "stages": [{"from_step": 4, "weights": [1, 3]}]}


@pytest.mark.parametrize("data", [{}, STAGED])
def test_tokens_and_validation_of_each_source_are_in_the_metrics(
    train: Callable[..., tuple[Lines, Lines]], data: dict[str, Any], tmp_path: Path
) -> None:
    training, validation = train(data=data)
    for line in training:
        assert sum(line["source_tokens"].values()) == line["tokens"]
    counts = [list(line["source_tokens"].values()) for line in training]
    assert counts == sorted(counts) and [name.split()[0] for name in training[0]["source_tokens"]] == ["text", "jsonl"]
    for line in validation:
        names = list(line["source_validation_loss"])
        assert names == list(line["source_validation_bits_per_byte"]) == list(training[0]["source_tokens"])
        assert all(0 < loss < 10 for loss in line["source_validation_loss"].values())
    resumed, _ = train("again", data=data, train__steps=4)
    resumed, _ = train("again", data=data)
    assert [line["source_tokens"] for line in resumed] == [line["source_tokens"] for line in training]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in training]


def test_a_stage_to_come_may_change_and_one_that_has_begun_may_not(
    train: Callable[..., tuple[Lines, Lines]],
) -> None:
    train(data=STAGED, train__steps=3)
    train(data={**STAGED, "stages": [{"from_step": 4, "weights": [3, 1]}]}, train__steps=5)
    with pytest.raises(UserError, match=r"data.stages is .* there and .* here"):
        train(data=STAGED, train__steps=6)


def test_skipped_steps_leave_all_others_their_rows(
    train: Callable[..., tuple[Lines, Lines]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = train("plain")
    skipping, _ = train("skipping", train__skip_steps=[[3, 4]])
    assert [line["step"] for line in skipping] == [1, 2, 5, 6]
    rows = {line["step"]: line["rows_hash"] for line in plain}
    assert {line["step"]: line["rows_hash"] for line in skipping}.items() <= rows.items()
    assert [line["lr"] for line in skipping[2:]] == [line["lr"] for line in plain[4:]]
    assert skipping[1]["loss"] == plain[1]["loss"] and skipping[2]["loss"] != plain[4]["loss"]
    written = [json.loads(line) for line in (tmp_path / "skipping/run/metrics.jsonl").read_text().splitlines()]
    assert [line for line in written if line.get("skipped_by_recipe")] == [
        {"step": step, "skipped_by_recipe": True, "rows_hash": rows[step]} for step in (3, 4)
    ]
    assert "step 3/6: passed over, as train.skip_steps says" in capsys.readouterr().out


def test_a_resume_skips_steps_that_went_wrong(train: Callable[..., tuple[Lines, Lines]]) -> None:
    """As after a loss spike: back to the checkpoint before it, past the rows that made it."""
    whole, _ = train("whole", train__skip_steps=[[3, 4]])
    train("halved", train__steps=2)
    resumed, _ = train("halved", train__skip_steps=[[3, 4]])
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    assert [line["tokens"] for line in resumed] == [line["tokens"] for line in whole]


def test_steps_in_the_wrong_order_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match=r"train.skip_steps: \[4, 3\]: the first is after the last"):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, train__skip_steps=[[4, 3]]))


def test_the_mixture_of_six_sources_trains_from_a_fresh_clone(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(f"{ROOT}/recipes/mixture.py")
    run(f"{ROOT}/recipes/mixture.py")  # finds them there
    # The standard library takes most of the time; a stand-in keeps the test short.
    library = [f"data.sources.0={{type: text, path: {Path(os.__file__).parent}/json/*.py, weight: 4}}"]
    short = ["data.stages=[{from_step: 3, weights: [6, 2, 2, 0.5, 0, 0.5]}]", "train.steps=4", "train.seq=128"]
    smaller = ["data.tokenizer.vocab_size=600", "train.global_batch_size=4", "train.validation_rows=6"]
    run(f"{ROOT}/launch/pretrain.py", f"{ROOT}/recipes/mixture.yaml", *library, *short, *smaller)
    training, validation = read_metrics(tmp_path / "runs" / "mixture")
    assert len(training) == 4 and len(training[-1]["source_tokens"]) == 6
    assert sum(count > 0 for count in training[-1]["source_tokens"].values()) >= 5
    assert len(validation[-1]["source_validation_loss"]) >= 3  # as many as have a document held out
