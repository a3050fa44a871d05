"""The options by which a command's user says how to decode."""

import argparse

from dash_train.inference.generation import choose_decoding
from dash_train.model.cache import PIECE_SIZE, Decoding, Sampling
from dash_train.model.config import ModelConfig

SAMPLING = {
    "sink": "tokens at the start of a row that are read for certain",
    "window": "tokens at the end of a row that are read for certain",
    "heavy": "share of the chunks that is read for certain because their summaries weigh most",
    "base_sample": "tokens of the first sample, from which the variances come",
    "max_sample": "a sample above this share of what it is taken from is not taken, everything is read",
    "value_floor": "least norm of an output that the error is relative to, in units of the values' root mean square",
}


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
    for name, meaning in SAMPLING.items():
        default = getattr(Sampling, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"vattention: {meaning} (default: %(default)s)",
        )
    parser.add_argument(
        "--bounds",
        action="store_true",
        help="vattention: keep the least and the largest key of every chunk, so that a lone heavy token is not missed",
    )
    parser.add_argument(
        "--piece-size",
        type=int,
        default=PIECE_SIZE,
        help="tokens of a prompt that are read together (default: %(default)s)",
    )


def decoding_of(args: argparse.Namespace, config: ModelConfig) -> Decoding:
    """What the options ask for."""
    names = ("epsilon", "delta", "verify", "routing_every", *SAMPLING, "bounds")
    return choose_decoding(config, args.decode, **{name: getattr(args, name) for name in names})
