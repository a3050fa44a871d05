"""What a user sees when a rank dies, hangs, or runs something else than the others."""

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from subprocess import run as run_command

import pytest
from failing_folders import collect_folder_refusals
from failing_ranks import collect_refusals, hang_at_the_start
from ranks import run_on_ranks
from tiny_runs import ENVIRONMENT, ROOT, run, start, write_recipe
from torch.multiprocessing import ProcessExitedException

from dash_train.distributed.place import find_place, set_place
from dash_train.distributed.watchdog import Post, describe
from dash_train.errors import EXIT_RANK_LOST, UserError
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training.checkpoint import newest
from dash_train.training.trainer import Trainer

LONG = {
    "parallel": {"zero_stage": 2, "context": 2, "timeout_seconds": 3},
    "schedule": {"type": "constant", "warmup_steps": 2},
    "train__steps": 10000,
    "train__validate_every": 0,
}


def start_two_ranks(recipe: Path, step: int) -> tuple[Popen[str], list[int]]:
    """Start a run on two ranks, wait for a step, and find the process of each rank in its log."""
    process = start("pretrain.py", recipe, ranks=2)
    metrics, logs = recipe.parent / "run" / "metrics.jsonl", recipe.parent / "run" / "logs"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    found = [re.search(r"process (\d+) on", (logs / f"rank-0000{rank}.log").read_text()) for rank in (0, 1)]
    return process, [int(match.group(1)) for match in found if match]


def test_a_rank_that_dies_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, **LONG)
    process, ranks = start_two_ranks(recipe, step=5)
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in stderr.splitlines() if "error:" in line]
    assert line.startswith(f"[rank 0] error: rank 1 (process {ranks[1]} on ")
    assert "is gone or stopped" in line and "run the same command to resume from the last checkpoint" in line
    assert "Traceback" not in stderr

    saved = newest(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    resumed = run("pretrain.py", recipe, f"train.steps={step + 2}", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {saved}" in resumed.stderr
    training, _ = read_metrics(tmp_path / "run")
    assert [line["step"] for line in training][: step + 2] == list(range(1, step + 3))


def test_a_rank_that_hangs_is_named(tmp_path, corpus):
    process, ranks = start_two_ranks(write_recipe(tmp_path / "recipe.yaml", corpus, **LONG), step=2)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{ranks[0]}").exists():  # until the launcher has seen its end
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.kill(ranks[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    (line,) = [line for line in stderr.splitlines() if "error:" in line]
    assert line.startswith(f"error: rank 1 (process {ranks[1]} on ")
    assert re.search(r"1 other rank\(s\) in step \d+, (loading data|forward|backward|optimizer|checkpoint);", line)
    assert "nothing has moved for 3 s (parallel.timeout_seconds)" in line
    assert "dash_train/training/trainer.py" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text(), (
        "the stack is kept"
    )


def test_a_rank_that_stops_at_the_start_is_named(tmp_path, corpus):
    """As soon as it has opened its log: long before the first step."""
    process = start("pretrain.py", write_recipe(tmp_path / "recipe.yaml", corpus, **LONG), ranks=2)
    log, deadline = tmp_path / "run" / "logs" / "rank-00001.log", time.monotonic() + 120
    while not (log.exists() and (found := re.search(r"process (\d+) on", log.read_text()))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    rank = int(found.group(1))
    os.kill(rank, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while "nothing has moved" not in (tmp_path / "run" / "logs" / "rank-00000.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.kill(rank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    (line,) = [line for line in stderr.splitlines() if "error:" in line]
    assert line.startswith(f"error: rank 1 (process {rank} on ") and "is gone or stopped, last seen in" in line


def test_a_rank_that_hangs_at_the_start_is_named(tmp_path):
    with pytest.raises(ProcessExitedException) as ended:
        run_on_ranks(2, hang_at_the_start, tmp_path)
    assert ended.value.exit_code == EXIT_RANK_LOST
    text = (tmp_path / "0.log").read_text()
    assert re.search(
        r"rank 1 \(process \d+ on \S+\) is still in building the model; 1 other rank\(s\) in loading", text
    )
    assert "nothing has moved for 2 s; run the same command" in text


def test_a_port_in_use_is_one_line(tmp_path, corpus):
    """Rank 0 of a run of two, on the port of something else."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(other.getsockname()[1])
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), str(write_recipe(tmp_path / "a.yaml", corpus))]
        result = run_command(command, env={**ENVIRONMENT, **place}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert f"MASTER_PORT={place['MASTER_PORT']}: the 2 ranks did not meet there" in line and "port that is free" in line
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_a_launcher_that_dies_leaves_a_checkpoint_and_no_rank(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, **{**LONG, "checkpoint__every": 10000})
    process, ranks = start_two_ranks(recipe, step=2)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert newest(tmp_path / "run" / "checkpoints") is not None


def test_ranks_with_other_folders_are_refused_and_the_main_rank_chooses_the_checkpoint(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, train__steps=4, train__validate_every=0)
    Trainer(load_recipe(recipe)).train()
    for rank in (0, 1):
        (tmp_path / f"node-{rank}").mkdir()
    run_on_ranks(2, collect_folder_refusals, recipe, tmp_path)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert told["stale"].endswith("step-00000004"), "rank 1 has not seen it yet"
        assert re.match(
            r"run_dir: \S+elsewhere is another folder on rank 1 \(on \S+\) than on rank 0", told["not shared"]
        )
        assert told["left"] == "[]"


SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        (SLURM, (5, 8, 1)),
        ({**SLURM, **OPEN_MPI}, (1, 2, 1)),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}, (0, 2, 0)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, (1, 2, 1)),
    ],
)
def test_a_rank_finds_its_place(variables, place):
    assert find_place(variables) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is 1 but WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x': expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected a rank from 0 to 1"),
        (OPEN_MPI, "set MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_stray_place_is_refused(variables, message):
    with pytest.raises(UserError, match=message):
        set_place({**variables})


def test_tasks_of_slurm_meet_on_its_first_node():
    variables = {**SLURM, "SLURM_STEP_NODELIST": "gpu[03-04,7],login1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}
    set_place(variables)
    assert variables["MASTER_ADDR"] == "gpu03"
    assert 20000 <= int(variables["MASTER_PORT"]) < 30000
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("5", "8", "1")


def test_the_rank_that_has_entered_the_fewest_phases_is_to_blame():
    posts = [Post("a", 9, 40, "step 7, forward"), Post("b", 9, 39, "step 7, loading data"), Post("c", 9, 40, "...")]
    assert describe(posts, []) == "rank 1 (b) is still in step 7, loading data; 2 other rank(s) in step 7, forward"
    assert describe(posts, [2]).startswith("rank 2 (c) is gone or stopped, last seen in ...; 2 other rank(s) in")
    assert describe(posts[:1] * 2, []) == "all ranks are in step 7, forward: a device or the network hangs"


def test_ranks_that_run_something_else_or_do_not_divide_are_refused(tmp_path, corpus):
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus)
    run_on_ranks(4, collect_refusals, recipe, tmp_path)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(4)]
    assert all(refusals == told[0] for refusals in told), "every rank is told the same"
    assert told[0]["same"] == ""
    other = r"rank {} \(on \S+\) does not run what rank 0 \(on \S+\) runs: {}; start all ranks with the same recipe"
    assert re.match(other.format(2, "optimizer.lr is 0.002 there and 0.001 here"), told[0]["another recipe"])
    assert re.match(other.format(1, "the version of torch is 2.1 there and 2.0 here"), told[0]["another package"])
    assert "parallel.context: 3 ranks share a row, but the run has 4" in told[0]["context"]
    assert "times the number of ranks (4) over parallel.context (2)" in told[0]["batch"]
