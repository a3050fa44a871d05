"""`dash-train VERB`: the programs of launch/, as an installed package has them."""

import sys
from pathlib import Path

import pytest
from tiny_runs import run, write_recipe

from dash_train.__main__ import main

ROOT = Path(__file__).parents[1]


def test_the_help_lists_every_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dash-train", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().out.splitlines()
    programs = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert stopped.value.code == 0 and {line.split()[0] for line in lines[-len(programs) :]} == programs


@pytest.mark.parametrize("before", [[], ["--local_rank=0"]])
def test_a_verb_does_what_its_program_does(before, tmp_path, corpus, monkeypatch, capsys):
    """Also with what the DeepSpeed launcher puts in front: the same line, the same exit code."""
    recipe = write_recipe(tmp_path / "recipe.yaml", corpus, train__stepz=1)
    monkeypatch.setattr(sys, "argv", ["dash-train", *before, "pretrain", str(recipe)])
    with pytest.raises(SystemExit) as stopped:
        main()
    result = run("pretrain.py", recipe)
    assert stopped.value.code == result.returncode == 2
    assert capsys.readouterr().err == result.stderr


def test_an_unknown_verb_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dash-train", "pretrian"])
    with pytest.raises(SystemExit):
        main()
    assert "argument VERB: invalid choice: 'pretrian'" in capsys.readouterr().err
