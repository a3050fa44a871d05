"""An exponential moving average of the weights: each rank keeps that of the pieces which it updates."""

from typing import Any

import torch
from torch import Tensor

from dash_train.training.model_state import pieces

EMA = "ema"


class Ema:
    """Averages of the weights as they are now, until `update` or `load` says otherwise."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self.pieces = pieces(engine)
        self.averages: dict[str, Tensor] = {piece.name: piece.of(piece.owner).clone() for piece in self.pieces}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into account."""
        averages = [self.averages[piece.name] for piece in self.pieces]
        torch._foreach_lerp_(averages, [piece.of(piece.owner) for piece in self.pieces], 1 - self.decay)
