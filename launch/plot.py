"""Draw a run's loss, learning rate, gradient norm, tokens/s, density and union factor per layer to one PNG.

python launch/plot.py runs/quickstart [--out loss.png]

Several runs: their losses over each other, the differences, and the gradients through the router where measured.
python launch/plot.py runs/one runs/other [--window 20] --out comparison.png
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.tracking.comparison import compare_runs
from dash_train.tracking.plot import plot_run


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="a run folder, or several")
    parser.add_argument("--out", type=Path, help="the PNG to write (default: loss.png in the run folder, or here)")
    parser.add_argument(
        "--window",
        type=int,
        default=20,
        help="several runs: steps over which losses are averaged (default: %(default)s)",
    )
    return parser


def main(args: Namespace) -> None:
    if len(args.runs) == 1:
        print(plot_run(args.runs[0], args.out))
        return
    out = args.out or Path("comparison.png")
    print("\n".join(compare_runs(args.runs, args.window, out)))
    print(out)


if __name__ == "__main__":
    run_command(main, build_parser())
