"""Run a study: variants of one recipe with several seeds, side by side; then tabulate and draw what they found.

python launch/study.py recipes/study/blocks.yaml [key.sub=value ...] --per-gpu 5 [--time-limit 560] [--alone 40]
    [--json blocks.json] [--figure blocks.png]

Run the same command again to go on: runs that are done are left alone, those that were stopped resume.
"""

import math
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.benchmark.report import write_json
from dash_train.command import command_parser, run_command
from dash_train.study.results import draw, study_results, table
from dash_train.study.runs import Launcher, Run, alone, load_study, study_runs

STARTED = time.monotonic()


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("study", type=Path, help="a study (YAML), as in recipes/study")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="values that replace the study's, for all variants"
    )
    parser.add_argument(
        "--per-gpu", type=int, default=1, help="runs at a time on each GPU (or the CPU) (default: %(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which runs are stopped, with a checkpoint each (default: none)"
    )
    parser.add_argument(
        "--alone",
        type=int,
        default=0,
        metavar="STEPS",
        help="when all runs are done, time each variant for so many steps, alone on a GPU (default: 0, not at all)",
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the results to, beside printing them")
    parser.add_argument("--figure", type=Path, help="PNG to draw the results to")
    return parser


def main(args: Namespace) -> None:
    runs = study_runs(load_study(args.study), args.overrides)
    launcher = Launcher(Path(__file__).with_name("pretrain.py"), STARTED + (args.time_limit or math.inf))
    failed = launcher.train(runs, args.per_gpu)
    speeds: list[Run] = []
    if args.alone and all(run.checkpoint() for run in runs):
        speeds = [alone(run, args.alone) for run in runs if run.seed == runs[0].seed]
        failed += launcher.train(speeds, per_gpu=1)
    results = study_results(runs, speeds, failed)
    print(f"{len(results['runs'])} of {len(runs)} runs are done, {len(failed)} failed")
    if results["runs"]:
        print(table(results))
        if args.json:
            write_json(args.json, args, results)
        if args.figure:
            draw(results, args.figure)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, build_parser())
