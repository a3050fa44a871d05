"""List, verify, average and convert the checkpoints of a run.

python launch/checkpoint.py list runs/quickstart
python launch/checkpoint.py verify runs/quickstart            # every hash of every checkpoint
python launch/checkpoint.py average runs/quickstart OUT --last 3
python launch/checkpoint.py convert runs/quickstart OUT [--step 500] [--ema]

OUT is a checkpoint folder of weights alone: export.py, evaluate.py, generate.py and init.from take it.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.training import derived, listing
from dash_train.training.ema import EMA
from dash_train.training.model_state import WEIGHT


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, what in (("list", "what checkpoints there are"), ("verify", "whether they are complete and undamaged")):
        verbs.add_parser(verb, help=what).add_argument("run", type=Path, help="a run folder")
    average = verbs.add_parser("average", help="the mean weights of the newest checkpoints")
    average.add_argument("run", type=Path, help="a run folder")
    average.add_argument("out", type=Path, help="the folder to write; it must be new")
    average.add_argument("--last", type=int, default=3, help="so many checkpoints (default: %(default)s)")
    convert = verbs.add_parser("convert", help="the weights of a checkpoint, of whatever version, in one file")
    convert.add_argument("run", type=Path, help="a run folder, or one of its checkpoints")
    convert.add_argument("out", type=Path, help="the folder to write; it must be new")
    convert.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    convert.add_argument("--ema", action="store_true", help="the moving average that optimizer.ema kept")
    return parser


def main(args: Namespace) -> None:
    if args.verb == "list":
        print(listing.table(args.run))
    elif args.verb == "verify":
        print("\n".join(listing.verify(args.run)))
    elif args.verb == "average":
        averaged = derived.average(args.run, args.out, args.last)
        print(f"{args.out}: the mean of {', '.join(path.name for path in reversed(averaged))}")
    else:
        found = derived.convert(args.run, args.out, step=args.step, kind=EMA if args.ema else WEIGHT)
        print(f"{args.out}: the {'moving average' if args.ema else 'weights'} of {found}")


if __name__ == "__main__":
    run_command(main, build_parser())
