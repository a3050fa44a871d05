"""Export a run's checkpoint as a Hugging Face folder: weights, configuration, tokenizer, model card.

python launch/export.py runs/quickstart exports/quickstart [--step 500] [--format authors]
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.huggingface.export import export_run


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, one of its checkpoints, or an exported folder")
    parser.add_argument("out", type=Path, help="the folder to write; it must be new or empty")
    parser.add_argument("--step", type=int, help="export this step's checkpoint (default: the newest)")
    parser.add_argument(
        "--format",
        choices=("transformers", "authors"),
        default="transformers",
        help="authors: of a Dash model as the paper's authors write theirs (indexer_q) (default: %(default)s)",
    )
    return parser


def main(args: Namespace) -> None:
    found = export_run(args.run, args.out, args.step, args.format)
    print(f"{args.out}: exported from {found}")


if __name__ == "__main__":
    run_command(main, build_parser())
