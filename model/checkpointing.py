"""What the backward pass finds of a block's forward pass, and what it computes again.

`none` keeps everything. `full` keeps the block's input. `selective` keeps, besides, what attention returned (output and
log-sum-exp), so that everything but attention is computed again. The inputs can wait in host memory: `offload.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

ActivationCheckpointing = Literal["none", "full", "selective"]

# The operators whose results `selective` keeps; FlexAttention's, for packed rows, is compiled into a kernel of no name.
ATTENTION = (
    "dash_train.dash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
)


def run_block(block: Callable[..., Any], inputs: tuple[Any, ...], policy: ActivationCheckpointing) -> Any:
    """block(*inputs), whose backward pass keeps and recomputes what the policy says."""
    if policy == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    contexts = _keep_attention if policy == "selective" else noop_context_fn
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


_keep_attention = partial(
    create_selective_checkpoint_contexts,
    lambda _, operator, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if str(operator) in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
    ),
)
