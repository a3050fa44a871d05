"""Make a recipe's tokenizer and token shards ahead of a run, which would otherwise make them when it starts.

python launch/prepare.py recipes/quickstart.yaml [--report] [key.sub=value ...]
python launch/prepare.py recipes/corpus.yaml --part 3/16    # one of 16 jobs, on any machines that share data.cache
"""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.data.prepare import prepare_part
from dash_train.data.report import describe_split, write_report
from dash_train.data.rows import training_rows, validation_rows
from dash_train.recipe.load import load_recipe


def build_parser() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="do the K-th of N shares of the work")
    parser.add_argument("--report", action="store_true", help="look at every token: report.txt and report.png")
    return parser


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ArgumentTypeError(f"expected K/N with K from 1 to N, as 3/16, found {text!r}")
    return int(found[1]), int(found[2])


def main(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    folder = prepare_part(recipe.data, *args.part)
    if folder is None:
        print(f"part {args.part[0]} of {args.part[1]} is done; the job that ends last puts the parts together")
        return
    cut = {"seq": recipe.train.seq, "chunk_size": recipe.model.attention.chunk_size}
    train = training_rows(recipe.data, folder, global_batch_size=recipe.train.global_batch_size, **cut)
    splits = {"train": train, "validation": validation_rows(folder, seed=recipe.data.seed, **cut)}
    if args.report:
        print(write_report(folder, splits))
        print(f"{folder}/report.txt, {folder}/report.png")
    else:
        for split, rows in splits.items():
            print(describe_split(split, rows))
            if len(rows.shards.meta.sources) > 1:
                for source in rows.summary():
                    print(f"  {source}")
    print(folder)


if __name__ == "__main__":
    run_command(main, build_parser())
