"""Train on from existing weights (init.from: a run, a checkpoint or an exported folder) with a fresh optimizer.

deepspeed launch/finetune.py recipes/finetune.yaml [key.sub=value ...]
"""

from argparse import ArgumentParser, Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.training.trainer import train


def build_parser() -> ArgumentParser:
    return recipe_parser(__doc__)


def main(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.init.from_ is None:
        raise UserError(f"{args.recipe}: init.from is required: a run folder, a checkpoint or an exported folder")
    train(recipe)


if __name__ == "__main__":
    run_command(main, build_parser())
