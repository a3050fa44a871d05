"""Out of memory: the message names the largest saving that the recipe leaves."""

import sys

import pytest
import torch
from tiny_runs import ROOT, write_recipe

from dash_train.command import run_command
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.training import out_of_memory

TORCH_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"

# Each step does what the message before it asked for.
LADDER = [
    ({}, 1, "train.activation_checkpointing: full (now none)"),
    ({"train__activation_checkpointing": "selective"}, 1, "train.activation_checkpointing: full (now selective)"),
    ({"train__activation_checkpointing": "full"}, 1, "a smaller train.micro_batch_size (now 2)"),
    ({"train__micro_batch_size": 1}, 1, "train.activation_offload: true"),
    ({"train__activation_offload": True}, 2, "parallel.zero_stage: 3 (now 1)"),
    ({"parallel__zero_stage": 3}, 2, "parallel.offload_optimizer: cpu"),
    ({"parallel__offload_optimizer": "cpu"}, 2, "parallel.offload_parameters: cpu"),
    ({"parallel__offload_parameters": "cpu"}, 2, "parallel.context: 2 (now 1)"),
    ({}, 1, "a shorter train.seq (now 128), or more GPUs and a larger parallel.context (now 1)"),
]


def message_of(recipe, ranks, **options):
    with pytest.raises(UserError) as error, out_of_memory.explain(recipe, ranks, **options):
        raise torch.OutOfMemoryError(TORCH_SAYS)
    return str(error.value)


def test_levers_come_in_their_order(tmp_path, corpus):
    changes = {}
    for step, ranks, lever in LADDER:
        changes |= step
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **changes))
        message = message_of(recipe, ranks)
        assert f"(tried to allocate 2.00 GiB); the largest saving left is {lever}; docs" in message


def test_building_names_what_makes_the_states_smaller(tmp_path, corpus):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus))
    assert "is parallel.zero_stage: 3 (now 1);" in message_of(recipe, 8, building=True)
    assert "is parallel.offload_optimizer: cpu;" in message_of(recipe, 1, building=True)


def test_a_run_ends_with_the_message_and_exit_code_2(tmp_path, corpus, capsys, monkeypatch):
    sys.path.insert(0, str(ROOT / "launch"))
    monkeypatch.setattr(sys, "path", sys.path)
    import pretrain

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError(TORCH_SAYS)

    monkeypatch.setattr("dash_train.model.loss.LanguageModelHead.forward", forward)
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, train__validate_every=0)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(recipe), "model.attention.routing_scale=50"])
    with pytest.raises(SystemExit) as stopped:
        run_command(pretrain.main, pretrain.recipe_parser(""))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: out of GPU memory (tried to allocate 2.00 GiB); the largest saving left is "
        "train.activation_checkpointing: full (now none)"
    )
