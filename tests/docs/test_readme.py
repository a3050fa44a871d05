"""What README.md tells a newcomer to do works, and what it tells them to read is there.

Every line of its bash blocks is checked in one of these ways, and a line that none of them knows fails:

- programs of launch/ are parsed by their own parser, with their recipe and overrides;
- those that a CPU can run in seconds (all but those in PARSED_ONLY) then run in the order of the page: the first trains
  a tiny model for two steps, the others plot, export, generate, evaluate and train on what it left;
- `make X`: the Makefile has that target and would start programs that exist;
- `pip install` installs this folder, and `source` names what `make install` makes.

Its Python blocks run as they are.
"""

import json
import re
import shlex
import subprocess

import pytest
import torch
from commands import check_command, command_lines, fenced, program, program_of
from tiny_runs import ROOT

README = (ROOT / "README.md").read_text()
LINES = command_lines(README)
PROGRAMS = [line for line in LINES if program_of(line)]
PARSED_ONLY = ("recipes/125m-8k.yaml", "launch/benchmark.py")  # hours on a CPU; needs a GPU
TRAINING = ["train.steps=2", "train.seq=128", "train.validate_every=0", "tracking.log_every=1", "checkpoint.every=2"]
TINY = {  # what makes a program's run short, beside the arguments of the page
    "pretrain": [*TRAINING, "data.tokenizer.vocab_size=512", "model.hidden_size=32", "model.mlp_size=64"],
    "finetune": [*TRAINING, "schedule.warmup_steps=1"],
    "generate": ["--max-new-tokens", "4"],
    "evaluate": ["--length", "128", "--documents", "2", "--lengths", "128", "--depths", "0.5", "--samples", "1"],
}


@pytest.mark.parametrize("line", PROGRAMS)
def test_programs_take_these_arguments(line):
    check_command(line)


def test_programs_run_and_leave_what_the_page_promises(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for line in PROGRAMS:
        if any(name in line for name in PARSED_ONLY):
            continue
        name, arguments = program_of(line)
        text = ["data.sources.0.type=text", f"data.sources.0.path={corpus}"] if name in ("pretrain", "finetune") else []
        launched = program(name)
        launched.main(launched.build_parser().parse_args([*arguments, *TINY.get(name, []), *text]))
        if name == "generate":
            assert re.search(r"(dash|vattention): \d+ tokens, [\d.]+ tokens/s", capsys.readouterr().out), line
    for row in re.findall(r"(?m)^\| (`[^|]+) \|", README.split("A run folder holds")[1].split("\n## ")[0]):
        for name in re.findall(r"`([^`]+)`", row):
            assert (tmp_path / "runs/quickstart" / name.replace("step-N", "step-00000002")).exists(), name
    assert (tmp_path / "exports/quickstart/config.json").exists()


def test_every_other_line_is_known():
    for line in LINES:
        if program_of(line):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            dry = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, text=True, capture_output=True)
            assert dry.returncode == 0, dry.stderr
            assert all((ROOT / path).exists() for path in re.findall(r"(?:launch|recipes)/\S+", dry.stdout))
        elif words[0] == "pip":
            assert words == ["pip", "install", "-e", "."] and (ROOT / "pyproject.toml").exists()
        else:
            assert words == ["source", ".venv/bin/activate"] and "-m venv .venv" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("block", fenced(README, "python"))
def test_python_blocks_run(block):
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_the_reading_order_leads_through_files_that_one_can_read():
    section = README.split("## Read the code in this order")[1].split("\n## ")[0]
    named = re.findall(r"`([^`]+\.(?:py|yaml))`", section)
    assert len(named) >= 10
    for name in named:
        assert len((ROOT / name).read_text().splitlines()) < 400, name


def test_folders_are_those_of_the_repository():
    named = re.findall(r"(?m)^\| `(\w+)/` \|", README.split("\n## Folders")[1])
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.split()
    if not tracked:
        pytest.skip("not a clone")
    assert set(named) == {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}


def test_its_speeds_are_those_of_the_results():
    rows = json.loads((ROOT / "docs/results/training.json").read_text())["rows"]
    text = {row["tokens"]: row["x"] for row in rows if row["kind"] == "text"}
    said = re.search(r"([\d.]+) times as\s+fast[^.]*? at 32K tokens and\s+([\d.]+) times at\s+128K", README)
    assert said and [float(number) for number in said.groups()] == [round(text[32768], 1), round(text[131072], 1)]
