"""Draw a run's loss, learning rate, gradient norm, tokens/s and density per layer to one PNG.

python launch/plot.py runs/quickstart [--out loss.png]
"""

from argparse import Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.plot import plot_run


def main(args: Namespace) -> None:
    print(plot_run(args.run, args.out))


if __name__ == "__main__":
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="the PNG to write (default: loss.png in the run folder)")
    run_command(main, parser)
