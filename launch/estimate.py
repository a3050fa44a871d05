"""Estimate the memory and the time of a recipe's training step on so many GPUs, before anything is started.

python launch/estimate.py recipes/8b-128k-zero3.yaml [key.sub=value ...] --gpus 64 [--gpu h100]
"""

from argparse import ArgumentParser, Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.estimate.machine import GPUS
from dash_train.estimate.report import check_fit, describe, estimate
from dash_train.recipe.load import load_recipe


def build_parser() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in all (default: %(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="their kind (default: %(default)s)")
    return parser


def main(args: Namespace) -> None:
    gpu = GPUS[args.gpu]
    found = estimate(load_recipe(args.recipe, args.overrides), args.gpus, gpu)
    print(describe(found, gpu))
    check_fit(found, gpu)


if __name__ == "__main__":
    run_command(main, build_parser())
