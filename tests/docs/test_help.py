"""What `--help` says of an option stands alone: a newcomer reads one line, not its neighbours."""

import argparse
from collections.abc import Iterator

import pytest
from commands import program
from tiny_runs import ROOT

PROGRAMS = sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py"))
DEPENDENT = ("of ", "(", "it ", "which ", "how often it", "also ", "the first of them", "then ")


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        elif action.help != argparse.SUPPRESS:
            yield action


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_is_explained_by_itself(name):
    parser = program(name).build_parser()
    for option in options(parser):
        called = option.option_strings or option.dest
        assert option.help, called
        assert not option.help.startswith(DEPENDENT), (called, option.help)
        assert len(option.help.partition("(default")[0].split()) >= 2, (called, option.help)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_can_be_printed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        program(name).build_parser().parse_args(["--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
