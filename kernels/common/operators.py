"""Registering functions that launch Triton kernels as operators of torch.library, at little cost to the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

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


def differentiate(
    operator: Any, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """Give an operator its gradient: save(ctx, inputs, output), then backward(ctx, *gradients of the outputs).

    What torch.library.register_autograd does for operators without default or keyword arguments, in a third of its
    time.
    """

    class Node(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            save(ctx, inputs, output)
            return output

    Node.backward = staticmethod(backward)  # type: ignore[method-assign, assignment]

    def with_gradient(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs):
            return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _library.impl(operator.name().split("::")[1].split(".")[0], with_gradient, "Autograd")
