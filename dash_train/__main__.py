"""`dash-train VERB ...`, or `python -m dash_train VERB ...`: the programs of `launch/`, wherever they are installed.

On several GPUs: deepspeed --module dash_train pretrain RECIPE
             or: torchrun --nproc-per-node 8 -m dash_train pretrain RECIPE
"""

import argparse
import ast
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from dash_train import launch
from dash_train.command import run_command


def main() -> None:
    """Run the program that the command line names."""
    verbs = [module.name for module in iter_modules(launch.__path__)]
    parser = argparse.ArgumentParser(
        prog="dash-train",
        description="Pretrain, export and decode long-context models. `dash-train VERB --help` says more of each:",
        epilog="\n".join(f"  {verb:10} {_summary(verb)}" for verb in verbs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what it takes")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher puts it first
    args = parser.parse_args()
    program = import_module(f"dash_train.launch.{args.verb}")
    sys.argv = [f"dash-train {args.verb}", *args.arguments]
    run_command(program.main, program.build_parser())


def _summary(verb: str) -> str:
    """The first line of a program's docstring, read from its file: importing all of them takes seconds."""
    source = Path(launch.__path__[0], f"{verb}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
