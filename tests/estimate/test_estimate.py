"""Estimates against what was measured, and against what they are made of."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dash_train.errors import UserError
from dash_train.estimate.machine import GB, GPUS
from dash_train.estimate.memory import memory_parts
from dash_train.estimate.report import check_fit, describe, estimate
from dash_train.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
MEASURED = [
    row
    for row in json.loads((ROOT / "docs/results/training.json").read_text())["rows"]
    if "--text" in row["command"] and "R 16" in row["inputs"]
]
BIG = ("model.vocab_size=32768", "train.global_batch_size=8")


def of_command(row: dict) -> tuple:
    """The recipe that a measured row's command ran, and its GPUs."""
    words = shlex.split(row["command"])
    values = {key: words[words.index(f"--{key}") + 1] for key in ("recipe", "seq")}
    gpus = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word) and "CONF" not in word]
    seq = int(values["seq"])
    batch = max(131072 // seq, 1)
    overrides += [f"train.seq={seq}", f"model.attention.initial_density={row['density']}", "model.vocab_size=32768"]
    overrides += [f"train.global_batch_size={batch}", "train.micro_batch_size=1"]
    return load_recipe(str(ROOT / values["recipe"]), overrides), gpus


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['tokens']}-{row['kind']}")
def test_within_a_tenth_of_what_was_measured(row: dict) -> None:
    recipe, gpus = of_command(row)
    found = estimate(recipe, gpus, GPUS["h200"])
    assert found.total_memory / GB == pytest.approx(row["memory_gb"], rel=0.1)
    if "no-warm-up" not in row["command"]:  # else its time holds that of the first step's allocations
        assert found.tokens_per_second == pytest.approx(row["ours"], rel=0.1)


def test_measured_rows_are_there() -> None:
    assert len(MEASURED) >= 5


def test_zero_divides_what_it_says() -> None:
    path = str(ROOT / "recipes/1b-128k.yaml")
    recipes = [load_recipe(path, [*BIG, f"parallel.zero_stage={stage}"]) for stage in (1, 2, 3)]
    one, many = ([memory_parts(recipe, gpus) for recipe in recipes] for gpus in (1, 8))
    assert [parts["optimizer"] * 8 for parts in many] == [one[0]["optimizer"]] * 3
    assert many[0]["gradients"] == one[0]["gradients"]
    assert many[1]["gradients"] * 8 == one[1]["gradients"]
    assert many[2]["weights"] < many[1]["weights"] / 2


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("train.seq=1048576", "train.global_batch_size=1"), "train.activation_checkpointing"),
        (("model.layers=200", "train.seq=8192"), "parallel.zero_stage"),
        (
            (
                "train.seq=8388608",
                "train.global_batch_size=1",
                "train.activation_checkpointing=full",
                "train.activation_offload=true",
            ),
            "parallel.context",
        ),
    ],
)
def test_what_cannot_fit_is_refused_by_the_key_to_change(overrides: tuple[str, ...], key: str) -> None:
    overrides = (*BIG, "model.attention.routing_block=16", "model.attention.routing_window=16", *overrides)
    gpu = GPUS["h100"]
    with pytest.raises(UserError, match=key):
        check_fit(estimate(load_recipe(str(ROOT / "recipes/1b-128k.yaml"), overrides), 1, gpu), gpu)


def test_many_nodes_say_what_is_assumed() -> None:
    recipe = load_recipe(str(ROOT / "recipes/8b-128k-zero3.yaml"), ["train.global_batch_size=64"])
    found = estimate(recipe, 64, GPUS["h100"])
    check_fit(found, GPUS["h100"])
    assert "50 GB/s a GPU between nodes" in describe(found, GPUS["h100"])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="global_batch_size"):
        estimate(load_recipe(str(ROOT / "recipes/8b-128k-zero3.yaml"), []), 64, GPUS["h100"])
