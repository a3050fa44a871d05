"""Which backend computes a call: plain torch on any device, or Triton where it can.

Public functions import Triton's modules where they call them: only that backend needs triton.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from dash_train.kernels.common.checks import check_choice

BACKENDS = ("auto", "reference", "triton")


def use_triton(function: str, backend: str, tensor: Tensor, obstacle: str | None) -> bool:
    """Whether Triton computes a call of `function` on the tensor's device: "auto" takes it on CUDA where it can.

    obstacle: why it cannot, None if it can.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend='triton' of {function} {obstacle}: use backend='reference'")
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and not obstacle)


def device_obstacle(tensor: Tensor) -> str | None:
    """Why Triton cannot compute in the tensor's type on its device; None if it can."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before the start"
    types = {torch.bfloat16, torch.float16, torch.float32} if tensor.is_cuda else {torch.float16, torch.float32}
    if tensor.dtype not in types:
        return f"does not compute in {tensor.dtype} on {tensor.device.type}"
    return None


def stride_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Why kernels that step through the last dimension one by one cannot read these tensors; None if they can."""
    if any(tensor is not None and tensor.stride(-1) != 1 for tensor in tensors):
        return "needs tensors whose last dimension is contiguous"
    return None
