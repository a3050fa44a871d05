"""Registering functions that launch Triton kernels as operators of torch.library."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("dash_train", "DEF")


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function becomes torch.ops.dash_train.NAME.default, on every device.

    What torch.library.custom_op does but for its wrappers, which take the host 50 us a call, as much as some kernels.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.dash_train, name).default

    return register
