"""Time this project against its peers on one GPU; docs/benchmarks.md has the results.

python launch/benchmark.py attention --seq 32768 --heads 32 --kv-heads 2 --density 0.25 --union 1.12
    [--backward] [--json row.json]
python launch/benchmark.py decode --batch 8 --context 131072 --heads 32 --kv-heads 8 --density 0.05
    [--decode full|dash|vattention] [--json row.json]
python launch/benchmark.py step --batch 8 --context 131072 --density 0.05 [--json row.json]
python launch/benchmark.py coverage [--captured FILE [--model EXPORT --text FILE]] [--json coverage.json]
"""

import json
from argparse import Namespace
from pathlib import Path

from dash_train.benchmark import attention, coverage, decode, step
from dash_train.command import command_parser, run_command

BENCHMARKS = {"attention": attention, "coverage": coverage, "decode": decode, "step": step}


def main(args: Namespace) -> None:
    row = BENCHMARKS[args.what].run(args)
    for name, value in row.items():
        if not isinstance(value, list):  # such as coverage's cells, which it printed itself
            print(f"{name:28}{value:.3f}" if isinstance(value, float) else f"{name:28}{value}")
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name not in ("json", "debug", "local_rank")}
        args.json.write_text(json.dumps({"arguments": arguments, **row}, indent=2, default=str))


if __name__ == "__main__":
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__)
        command.add_argument("--json", type=Path, help="also write the row to this file")
        module.add_arguments(command)
    run_command(main, parser)
