"""Pretrain a model from a recipe; run the same command again to resume.

deepspeed launch/pretrain.py recipes/quickstart.yaml [key.sub=value ...]
python launch/pretrain.py recipes/quickstart.yaml --dry-run [--ranks 8]    # what it would do, and whether it could
"""

from argparse import ArgumentParser, Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.distributed.place import find_place
from dash_train.recipe.load import load_recipe
from dash_train.training.dry_run import dry_run
from dash_train.training.trainer import train


def build_parser() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check all that can be known without training, and end")
    parser.add_argument("--ranks", type=int, help="ranks that a dry run counts with (default: those that are started)")
    return parser


def main(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    if not getattr(args, "dry_run", False):  # who calls main may have a parser of their own
        train(recipe)
        return
    rank, ranks, _ = find_place()
    if rank == 0:
        for line in dry_run(recipe, args.ranks or ranks):
            print(line)


if __name__ == "__main__":
    run_command(main, build_parser())
