"""Commands that documents show: told apart, parsed by the programs' own parsers, their files looked up."""

import importlib.util
import re
import shlex
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from tiny_runs import ROOT

from dash_train.recipe.load import load_recipe

LAUNCHERS = ("python", "deepspeed", "torchrun")
OF_LAUNCHERS = ("--num_gpus", "--nproc_per_node", "--hostfile", "--master_addr", "--master_port")


def fenced(text: str, language: str) -> list[str]:
    """The blocks of a Markdown text that are fenced as `language`."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def command_lines(text: str) -> list[str]:
    """The commands of a document's bash blocks, with continued lines joined, without comments."""
    lines = "\n".join(fenced(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def program_of(line: str) -> tuple[str, list[str]] | None:
    """(the program in launch/, its arguments) of a line that starts one, else None."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words or words[0] not in LAUNCHERS:
        return None
    words.pop(0)
    while words and words[0] in OF_LAUNCHERS:
        words = words[2:]
    path = Path(words.pop(0))
    assert path.parent == Path("launch") and (ROOT / path).exists(), f"{line}: no such program"
    return path.stem, words


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_command(line: str) -> Namespace:
    """Parse a line that starts a program as the program would, its recipe and overrides as well; recipes exist."""
    found = program_of(line)
    assert found, f"{line}: starts no program of launch/"
    name, arguments = found
    try:
        args = program(name).build_parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError(f"{line}: {name}.py does not take these arguments") from None
    if getattr(args, "recipe", None):
        load_recipe(ROOT / args.recipe, args.overrides)
    if name == "study":
        assert (ROOT / args.study).exists(), f"{line}: no such study"
    return args
