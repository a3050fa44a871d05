"""What the backward pass finds of a block's forward pass, and what it computes again.

`none` keeps everything. `full` keeps the block's input. `selective` keeps, besides, what attention returned (output and
log-sum-exp), so that everything but attention is computed again. The inputs can wait in host memory: `offload.py`.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dash_train.model.config import ActivationCheckpointing

# The operators whose results `selective` keeps; FlexAttention's, for packed rows, is compiled into a kernel of no name.
ATTENTION = (
    "dash_train.dash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
)


class _Thread(threading.local):
    """The backward pass has a thread of its own."""

    mode: "_AttentionMode | None" = None


_this_thread = _Thread()


def run_block(block: Callable[..., Any], inputs: tuple[Any, ...], policy: ActivationCheckpointing) -> Any:
    """block(*inputs), whose backward pass keeps and recomputes what the policy says."""
    if policy == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    contexts = _keep_and_recall if policy == "selective" else noop_context_fn
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def attention_of_block() -> AbstractContextManager[Any]:
    """Entered around a block's attention: where the policy is `selective`, its results are kept or recalled.

    Around nothing more, because what watches operators delays the launch of each.
    """
    return _this_thread.mode or nullcontext()


@contextmanager
def _during_block(mode: "_AttentionMode") -> Iterator[None]:
    before = _this_thread.mode
    _this_thread.mode = mode
    try:
        yield
    finally:
        _this_thread.mode = before


def _keep_and_recall() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of one block's forward pass and of its recomputation.

    torch's create_selective_checkpoint_contexts demands the same operators of both, which ZeRO-3's gathering of weights
    does not keep to.
    """
    kept: deque[Any] = deque()
    return _during_block(_Keep(kept)), _during_block(_Recall(kept))


class _AttentionMode(TorchDispatchMode):
    """Sees every operator that is called under it; subclasses deal with attention's."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """FlexAttention stays compiled under this mode."""
        return True

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(operator) in ATTENTION:
            return self.attention(operator, args, kwargs or {})
        return operator(*args, **(kwargs or {}))

    def attention(self, operator: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Keep(_AttentionMode):
    def attention(self, operator: Any, args: Any, kwargs: Any) -> Any:
        results = operator(*args, **kwargs)
        # Detached, or what is kept would hold the graph that it becomes part of.
        self.kept.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, results))
        return results


class _Recall(_AttentionMode):
    def attention(self, operator: Any, args: Any, kwargs: Any) -> Any:
        return self.kept.popleft()
