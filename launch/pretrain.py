"""Pretrain a model from a recipe; run the same command again to resume.

deepspeed launch/pretrain.py recipes/quickstart.yaml [key.sub=value ...]
"""

from argparse import ArgumentParser, Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.recipe.load import load_recipe
from dash_train.training.trainer import Trainer


def build_parser() -> ArgumentParser:
    return recipe_parser(__doc__)


def main(args: Namespace) -> None:
    Trainer(load_recipe(args.recipe, args.overrides)).train()


if __name__ == "__main__":
    run_command(main, build_parser())
