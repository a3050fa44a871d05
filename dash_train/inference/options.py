"""The options by which a command's user says how to decode."""

import argparse

from dash_train.inference.generation import choose_decoding
from dash_train.model.cache import PIECE_SIZE, Decoding
from dash_train.model.config import ModelConfig


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    """--decode and what goes with it."""
    parser.add_argument(
        "--decode",
        choices=("full", "dash", "vattention"),
        help="full: attend to everything, whatever a router says; dash: as the model was trained; vattention: read a "
        "sample, with an error bound (default: dash for models with Dash layers, else full)",
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        default=Decoding.epsilon,
        help="vattention: relative error of a head's output (or of --verify) (default: %(default)s)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=Decoding.delta,
        help="vattention: share of heads and steps in which the error may exceed epsilon (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        choices=("output", "denominator"),
        default=Decoding.verify,
        help="vattention: error of what, attention's output or softmax's denominator (default: %(default)s)",
    )
    parser.add_argument(
        "--routing-every",
        type=int,
        help="Dash layers choose their chunks at every so many tokens, a power of two, where their routing block is "
        "longer (default: their routing block)",
    )
    parser.add_argument(
        "--piece-size",
        type=int,
        default=PIECE_SIZE,
        help="tokens of a prompt that are read together (default: %(default)s)",
    )


def decoding_of(args: argparse.Namespace, config: ModelConfig) -> Decoding:
    """What the options ask for."""
    names = ("epsilon", "delta", "verify", "routing_every")
    return choose_decoding(config, args.decode, **{name: getattr(args, name) for name in names})
