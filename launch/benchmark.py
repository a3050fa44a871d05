"""Time this project against its peers on one GPU.

docs/benchmarks.md has the results.

python launch/benchmark.py attention --seq 32768 --heads 32 --kv-heads 2 --density 0.25 --union 1.12
    [--routing-block 16 [--routing-window 16]] [--backward] [--json row.json]
python launch/benchmark.py attention --captured FILE [--json layers.json]
python launch/benchmark.py train --recipe recipes/1b-128k.yaml --seq 8192,32768,65536,131072 --attention dash,full
    --peer huggingface [--steps 2] [--json rows.json]
python launch/benchmark.py decode --batch 8 --context 131072 --heads 32 --kv-heads 8 --density 0.05
    [--decode full|dash|vattention] [--routing-block 16 [--routing-window 16]] [--json row.json]
python launch/benchmark.py step --batch 8 --context 131072 --density 0.05
    [--routing-block 16 [--routing-window 16]] [--json row.json]
python launch/benchmark.py load --documents 100000000 --seq 32768 [--rows 2000] [--index 0] [--json row.json]
python launch/benchmark.py prepare recipes/quickstart.yaml [key.sub=value ...] [--json row.json]
python launch/benchmark.py coverage [--captured FILE] [--json coverage.json]
python launch/benchmark.py capture --model EXPORT --text FILE --seq 8192 --rows 4 --out FILE
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.benchmark import attention, captured, coverage, decode, load, preparation, step, train
from dash_train.benchmark.report import write_json
from dash_train.command import command_parser, run_command

BENCHMARKS = {
    "attention": attention,
    "capture": captured,
    "coverage": coverage,
    "decode": decode,
    "load": load,
    "prepare": preparation,
    "step": step,
    "train": train,
}


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__)
        command.add_argument("--json", type=Path, help="JSON file to write the result to, beside printing it")
        module.add_arguments(command)
    return parser


def main(args: Namespace) -> None:
    result = BENCHMARKS[args.what].run(args)
    for name, value in result.items():
        if not isinstance(value, list):  # a benchmark of several rows prints them itself
            print(f"{name:28}{value:.3f}" if isinstance(value, float) else f"{name:28}{value}")
    if args.json and int(os.environ.get("RANK", 0)) == 0:
        write_json(args.json, args, result)


if __name__ == "__main__":
    run_command(main, build_parser())
