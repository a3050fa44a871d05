"""Studies: which runs they start, how they end, what is made of them. Real runs are tiny and few."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import yaml
from tiny_runs import ENVIRONMENT, ROOT, write_recipe

from dash_train.errors import UserError
from dash_train.study.results import study_results
from dash_train.study.runs import Launcher, alone, load_study, study_runs
from dash_train.tracking.metrics import read_metrics


def write_study(folder, corpus, **changes):
    """A study of two variants and two seeds, of 4 steps each."""
    recipe = write_recipe(folder / "recipe.yaml", corpus)
    study = {
        "recipe": str(recipe),
        "run_dir": str(folder / "runs"),
        "overrides": {"train.steps": 4, "tracking.log_every": 2},
        "variants": {"dash": {}, "full": {"model.attention.type": "full"}},
        "seeds": [0, 1],
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def test_a_study_from_start_to_figure(tmp_path, corpus):
    study = write_study(tmp_path, corpus)
    files = [tmp_path / "results.json", tmp_path / "figure.png"]
    command = [sys.executable, ROOT / "launch/study.py", study, "train.seq=64", "--per-gpu", "2"]
    command += ["--json", files[0], "--figure", files[1]]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs are done, 0 failed" in done.stdout and "| full | 2 |" in done.stdout
    results = json.loads(files[0].read_text())
    dash, full = results["variants"]
    assert [dash["variant"], full["variant"]] == ["dash", "full"] and results["failed"] == []
    assert 0 < dash["density"] < 1 <= dash["union_factor"] and full["density"] is None
    assert "validation_difference" not in dash and abs(full["validation_difference"]) > 0
    assert dash["parameters"] == full["parameters"] + 2 * 2 * 16  # the chunk queries
    losses = [run["validation_loss"] for run in results["runs"]]
    assert len(set(losses)) == 4 and dash["validation_spread"] == pytest.approx(abs(losses[0] - losses[2]))
    assert files[1].read_bytes().startswith(b"\x89PNG")

    runs = study_runs(load_study(study), ["train.seq=64"])
    lines = [[(line["step"], line["rows_hash"]) for line in read_metrics(run.folder)[0]] for run in runs]
    assert lines[0] == lines[1] == lines[2] == lines[3] and len(lines[0]) == 4
    program = tmp_path / "no such program"
    assert Launcher(program, math.inf).train(runs, per_gpu=1) == []  # nothing is left to start


def test_a_run_that_is_stopped_can_go_on(tmp_path, corpus, monkeypatch):
    """Here alone, for its speed; another start of the study would resume it in the same way."""
    study = write_study(tmp_path, corpus, variants={"dash": {}}, seeds=[0])
    (run,) = study_runs(load_study(study), ["train.steps=500", "checkpoint.every=500", "train.validate_every=500"])
    metrics, program = run.folder / "metrics.jsonl", ROOT / "launch/pretrain.py"
    launcher = Launcher(program, math.inf)
    monkeypatch.setattr(launcher, "_is_over", lambda: metrics.exists() and '"step": 3,' in metrics.read_text())
    assert launcher.train([run], per_gpu=1) == []
    (saved,) = (run.folder / "checkpoints").glob("step-*")
    step = int(saved.name[5:])
    assert run.checkpoint() is None and 3 <= step < 500

    (shorter,) = study_runs(load_study(study), [f"train.steps={step}"])
    assert shorter.checkpoint() == saved
    timed = alone(shorter, steps=2)
    assert Launcher(program, math.inf).train([timed], per_gpu=1) == []
    assert [line["step"] for line in read_metrics(timed.folder)[0]] == [step + 1, step + 2]
    (variant,) = study_results([shorter], [timed], [])["variants"]
    assert variant["tokens_per_second"] > 0


def test_what_a_run_gets_and_what_becomes_of_a_failure(tmp_path, corpus, monkeypatch, caplog):
    """As many at a time as there are places, each with a GPU and a port of its own; one that fails is said to."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys, time\n"
        "folder = json.loads(sys.argv[-2].partition('=')[2])\n"
        "began = time.time()\n"
        "time.sleep(0.5)\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'MASTER_PORT', 'OMP_NUM_THREADS')\n"
        "json.dump([began, time.time(), *(os.environ[name] for name in names)], open(folder + '/seen.json', 'w'))\n"
        "sys.exit('it did not work' if 'full-s1' in folder else 0)\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = study_runs(load_study(write_study(tmp_path, corpus, seeds=[0, 1, 2])))
    failed = Launcher(program, math.inf).train(runs, per_gpu=2)
    assert [run.folder.name for run in failed] == ["full-s1"]
    assert "full-s1: failed with exit code 1:\nit did not work" in caplog.text
    seen = [json.loads((run.folder / "seen.json").read_text()) for run in runs]
    assert [gpu for _, _, gpu, _, _ in seen][:4] == ["2", "5", "2", "5"]
    assert len({port for _, _, _, port, _ in seen}) == 6 and {threads for *_, threads in seen} == {"2"}
    assert max(sum(begin <= moment < end for begin, end, *_ in seen) for moment, *_ in seen) <= 4


def test_no_time_starts_nothing(tmp_path, corpus):
    runs = study_runs(load_study(write_study(tmp_path, corpus)))
    assert Launcher(tmp_path / "no such program", time.monotonic() - 1).train(runs, per_gpu=1) == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variantz": {}}, "study.yaml: variantz: Extra inputs"),
        ({"variants": {"a b": {}}}, "study.yaml: variants.a b"),
        ({"seeds": []}, "study.yaml: seeds"),
        ({"overrides": {"train.stepz": 1}}, "train.stepz: unknown key"),
        ({"overrides": {"train.validate_every": 0}}, "dash: train.validate_every is 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, corpus, changes, message):
    with pytest.raises(UserError, match=message) as error:
        study_runs(load_study(write_study(tmp_path, corpus, **changes)))
    assert "\n" not in str(error.value)


def test_the_shipped_studies_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (ROOT / "recipes" / "study").glob("*.yaml"):
        runs = study_runs(load_study(path))
        assert len({run.folder for run in runs}) == len(runs)
        assert os.path.commonpath([run.folder for run in runs]).startswith(os.path.abspath("runs"))
