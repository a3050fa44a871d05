"""Registering functions that launch Triton kernels as operators of torch.library, at little cost to the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

_library = torch.library.Library("dash_train", "DEF")
_functions: dict[Any, Callable[..., Any]] = {}  # by operator


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function becomes torch.ops.dash_train.NAME.default, on every device.

    What torch.library.custom_op does but for its wrappers, which take the host 50 us a call, as much as some kernels.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        registered = getattr(torch.ops.dash_train, name).default
        _functions[registered] = function
        return registered

    return register


def differentiate(
    operator: Any, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an operator its gradient: save(ctx, inputs, output), then backward(ctx, *gradients of the outputs).

    What torch.library.register_autograd does for operators without default or keyword arguments, in a third of its
    time.

    Returns: the operator for callers who know it. Where nobody looks at operators (torch.compile, a dispatch mode,
    tensors of another class) it passes torch's dispatcher by, which takes the host over 50 us a call.
    """
    function = _functions[operator]

    def compute(*inputs: Any) -> Any:
        if not _is_watched(inputs):
            return function(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    class Node(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

    Node.backward = staticmethod(backward)  # type: ignore[method-assign]

    def with_gradient(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return Node.apply(*inputs)
        return compute(*inputs)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if _is_watched(inputs) else with_gradient(*inputs)

    _library.impl(operator.name().split("::")[1].split(".")[0], with_gradient, "Autograd")
    return call


def _is_watched(inputs: tuple[Any, ...]) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(i, Tensor) and type(i) not in (Tensor, Parameter) for i in inputs)
    )
