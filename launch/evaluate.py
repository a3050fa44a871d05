"""Evaluate a trained model, an export or a run, by one way of decoding: JSON, a table and a figure a task.

python launch/evaluate.py runs/quickstart [--tasks loss needle] [--decode vattention --epsilon 0.05 --delta 0.05]
python launch/evaluate.py exports/quickstart --text FILE_OR_FOLDER
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.evaluation.subject import Subject, read_documents
from dash_train.evaluation.tasks import TASKS, evaluate
from dash_train.inference.options import add_decode_options, decoding_of
from dash_train.inference.trained import load_trained


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", type=Path, help="a run folder, a checkpoint, or an exported folder")
    parser.add_argument("--text", type=Path, help="a text file, or a folder of them (default: the run's held-out text)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to run (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: evaluations/MODEL-DECODE)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is sampled (default: %(default)s)")
    add_decode_options(parser)
    for name, task in TASKS.items():
        task.add_arguments(parser.add_argument_group(f"task {name}", task.__doc__.partition("\n")[0]))
    return parser


def main(args: Namespace) -> None:
    trained = load_trained(args.model)
    decoding = decoding_of(args, trained.model.config)
    subject = Subject(trained, decoding, args.piece_size, read_documents(trained, args.text), args.seed)
    out = args.out or Path("evaluations", f"{args.model.resolve().name}-{decoding.mode}")
    for name in args.tasks:
        evaluate(subject, name, args, out)


if __name__ == "__main__":
    run_command(main, build_parser())
