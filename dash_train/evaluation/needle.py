"""Needle in a haystack: a sentence with a number, hidden at some depth of a long text, is asked for at its end.

The text up to the question is the prompt; the question and the answer are decoded token by token. An answer is right
when each of its tokens is the likeliest one.
"""

import argparse
import random
from itertools import chain
from typing import Any

import torch

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.evaluation.forced import decode_along
from dash_train.evaluation.subject import Subject, summary
from dash_train.inference.decode_report import DecodeReport

QUESTION = "\nThe secret number of {name} is"
NAMES = ("Amber", "Birch", "Cedar", "Dahlia", "Elm", "Fern", "Ginger", "Hazel", "Iris", "Juniper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's options."""
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="tokens of the whole text (default: 1/4, 1/2 and all of the context the model was trained on)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="places of the needle in the text, from 0, its start, to 1 (default: 0 .25 .5 .75 1)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="needles of each length and depth, decoded together (default: %(default)s)",
    )


def run(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and loss (nats per token of the answer) of each cell, with the density and half-width of its steps."""
    lengths = args.lengths or [subject.trained.seq // 4, subject.trained.seq // 2, subject.trained.seq]
    if args.samples < 1 or not all(0 <= depth <= 1 for depth in args.depths):
        raise UserError(
            f"expected --depths from 0 to 1 and --samples of at least 1; found {args.depths}, {args.samples}"
        )
    tokenizer = subject.trained.tokenizer
    specials = {tokenizer.bos_id, tokenizer.eos_id}
    text = [token for token in chain.from_iterable(subject.documents) if token not in specials]
    if len(text) < max(lengths):
        raise UserError(f"--lengths: {max(lengths)} tokens wanted, the text has {len(text)}; give a longer --text")
    cells = [_cell(subject, text, length, depth, args.samples) for length in lengths for depth in args.depths]
    grid = {"lengths": lengths, "depths": args.depths, "samples": args.samples}
    return {**grid, **subject.describe(), "cells": cells}


def _cell(subject: Subject, text: list[int], length: int, depth: float, samples: int) -> dict[str, Any]:
    tokenizer = subject.trained.tokenizer
    generator = random.Random(f"{subject.seed} {length}")  # the same needles and texts at every depth
    contexts, questions, answers = [], [], []
    for _ in range(samples):
        name, number = generator.choice(NAMES), str(generator.randrange(10000, 100000))
        question, answer = _question(tokenizer, name, number)
        needle = tokenizer.encode(f"{QUESTION.format(name=name)} {number}.\n")
        room = length - 1 - len(needle) - len(question) - len(answer)
        if room < 1:
            raise UserError(f"--lengths: {length} tokens have no room for a needle and its question; give longer ones")
        start = generator.randrange(len(text) - room + 1)
        hay, place = text[start : start + room], round(depth * room)
        contexts.append([tokenizer.bos_id, *hay[:place], *needle, *hay[place:]])
        questions.append(question)
        answers.append(answer)
    report = DecodeReport()
    continuations = [question + answer for question, answer in zip(questions, answers, strict=True)]
    longest = max(map(len, continuations))
    padded = [tokens + [tokenizer.eos_id] * (longest - len(tokens)) for tokens in continuations]
    forced = decode_along(subject, contexts, padded, report)
    # The prediction of token i of a continuation stands at i - 1.
    spans = [slice(len(q) - 1, len(q) + len(a) - 1) for q, a in zip(questions, answers, strict=True)]
    losses = torch.stack([loss[span].mean() for loss, span in zip(forced.losses, spans, strict=True)])
    right = torch.stack([row[span].all() for row, span in zip(forced.is_likeliest, spans, strict=True)])
    return {
        "length": length,
        "depth": depth,
        "accuracy": right.float().mean().item(),
        "answer_loss": losses.mean().item(),
        **summary(report),
    }


def _question(tokenizer: Tokenizer, name: str, number: str) -> tuple[list[int], list[int]]:
    """The tokens of the question, and those that the answer adds."""
    question = tokenizer.encode(QUESTION.format(name=name))
    whole = tokenizer.encode(f"{QUESTION.format(name=name)} {number}")
    common = next((i for i, pair in enumerate(zip(question, whole, strict=False)) if pair[0] != pair[1]), len(question))
    return whole[:common], whole[common:]


def table(result: dict[str, Any]) -> Any:
    """One line a cell."""
    from rich.table import Table

    lines = Table(title=f"Needle in a haystack, {result['decode']}, {result['samples']} needles a cell")
    for name in ("length", "depth", "accuracy", "answer loss", "density", "half-width", "fallbacks"):
        lines.add_column(name, justify="right")
    for cell in result["cells"]:
        made_at = ["" if cell[name] is None else f"{cell[name]:.3f}" for name in ("density", "half_width", "fallbacks")]
        values = [f"{cell['depth']:g}", f"{cell['accuracy']:.2f}", f"{cell['answer_loss']:.3f}"]
        lines.add_row(str(cell["length"]), *values, *made_at)
    return lines


def draw(result: dict[str, Any], figure: Any) -> None:
    """Accuracy, and the answers' loss, over length and depth."""
    lengths, depths, cells = result["lengths"], result["depths"], result["cells"]
    for axis, (name, limits) in zip(
        figure.subplots(1, 2), {"accuracy": (0, 1), "answer_loss": (0, None)}.items(), strict=True
    ):
        values = torch.tensor([cell[name] for cell in cells]).view(len(lengths), len(depths)).T
        image = axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set(title=name.replace("_", " "), xlabel="tokens", ylabel="depth")
        figure.colorbar(image, ax=axis)
