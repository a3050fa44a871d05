"""Launching Triton kernels at little cost to the host.

Triton's own launch looks at every argument and every constant to find the compiled kernel, then asks each tensor for
its address and the driver whether that is a device's. With the forty arguments of ours that takes the host over 0.1 ms
a launch, longer than the kernels themselves run at short sequences.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# For map, which is faster than a loop.
_address, _dtype, _misalignment = Tensor.data_ptr, attrgetter("dtype"), (15).__and__
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), for kernels whose constants are their last parameters.

    An argument may be a NamedTuple of numbers or of tensors: kernels name its fields.
    The compiled kernel is remembered by all that it can depend on: numbers, types, alignment of addresses, the device.
    It is called with addresses in place of tensors, and without Triton's launch hooks.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device()
    traits: list[Any] = [kernel.fn, device]
    values: list[Any] = []
    for argument in args:
        kind = type(argument)
        if kind is int:
            values.append(argument)
            traits.append(argument)
        elif kind is Tensor:
            address = argument.data_ptr()
            values.append(address)
            traits += (argument.dtype, address & 15)
        elif kind is float:  # kernels do not depend on its value
            values.append(argument)
            traits.append(float)
        elif isinstance(argument, tuple):  # a NamedTuple: of numbers, or of tensors
            if type(argument[0]) is int:
                values.append(argument)
                traits.append(argument)
            else:
                addresses = tuple(map(_address, argument))
                values.append(addresses)
                traits += map(_dtype, argument)
                traits += map(_misalignment, addresses)
        elif kind is TensorDescriptor:
            values.append(argument)
            traits += (argument.base.dtype, *argument.block_shape)
        elif argument is None:
            values.append(None)
            traits.append(None)
        else:  # a tensor of another class: as above
            values.append(argument.data_ptr())
            traits += (argument.dtype, values[-1] & 15)
    key = (*traits, *constants.values())
    known = _compiled.get(key)
    if known is None:
        if compiled := kernel[grid](*args, **constants):
            handles = (compiled.function, compiled.packed_metadata, None, None, None)
            _compiled[key] = compiled.run, handles, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    run, handles, last_values = known
    run(*(*grid, 1, 1)[:3], torch._C._cuda_getCurrentRawStream(device), *handles, *values, *last_values)
