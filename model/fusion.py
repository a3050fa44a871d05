"""Fusing a chain of elementwise operations into one GPU kernel each way."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def fused_on_cuda(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compile `function` for calls whose first argument is on CUDA; elsewhere it runs as it is."""

    @cache
    def compiled() -> Callable[P, Tensor]:  # on first use: torch.compile takes a second to import
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        on_cuda = isinstance(args[0], Tensor) and args[0].is_cuda
        return compiled()(*args, **kwargs) if on_cuda else function(*args, **kwargs)

    return call
