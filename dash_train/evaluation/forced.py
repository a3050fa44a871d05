"""Decoding along a given text: what the model thinks of each next token, at the density at which it decodes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_train.evaluation.subject import Subject
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.decode_step import DecodeStep
from dash_train.inference.generation import read_prompts


class Forced(NamedTuple):
    """How well a model foresaw every row's continuation, token by token but for the first."""

    losses: Tensor  # [rows, tokens - 1] fp32, on the CPU
    is_likeliest: Tensor  # the same shape, bool: what a greedy generation would have given


@torch.no_grad()
def decode_along(
    subject: Subject, contexts: list[list[int]], continuations: list[list[int]], report: DecodeReport
) -> Forced:
    """Read the contexts as prompts, then step along the continuations, which are of equal length, of at least two.

    The steps are counted in `report`.
    """
    steps = len(continuations[0]) - 1
    cache = subject.new_cache(len(contexts), max(map(len, contexts)) + steps)
    read_prompts(subject.trained.model, contexts, cache)
    step = DecodeStep(subject.trained.model, cache)
    tokens = torch.tensor(continuations, device=subject.trained.device)
    losses, likeliest = [], []
    for i in range(steps):
        logits = step(tokens[:, i])
        losses.append(F.cross_entropy(logits.float(), tokens[:, i + 1], reduction="none"))
        likeliest.append(logits.argmax(-1) == tokens[:, i + 1])
    report.count(cache)
    return Forced(torch.stack(losses, 1).cpu(), torch.stack(likeliest, 1).cpu())
