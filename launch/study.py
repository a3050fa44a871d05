"""Run a study: variants of one recipe with several seeds, side by side; then tabulate and draw what they found.

python launch/study.py recipes/study/blocks.yaml [key.sub=value ...] --per-gpu 5 [--time-limit 560] [--alone 40]
    [--json blocks.json] [--figure blocks.png]

Run the same command again to go on: runs that are done are left alone, those that were stopped resume.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path

from dash_train.benchmark.report import write_json
from dash_train.command import command_parser, run_command
from dash_train.study import Launcher, Run, alone, load_study, study_runs
from dash_train.study_results import draw, study_results, table

STARTED = time.monotonic()


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
    parser = command_parser(__doc__)
    parser.add_argument("study", type=Path, help="a study (YAML), as in recipes/study")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace the study's for all variants")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on each GPU (or the CPU)")
    parser.add_argument("--time-limit", type=float, help="seconds after which runs are stopped")
    parser.add_argument("--alone", type=int, default=0, metavar="STEPS", help="then time each variant, alone on a GPU")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--figure", type=Path, help="also draw them to this PNG")
    run_command(main, parser)
