"""The arithmetic of one optimizer step: what the trainer runs and the benchmark times."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_train.data.loader import IGNORE
from dash_train.distributed.world import World, sum_over_ranks
from dash_train.model.context import Context
from dash_train.model.rows import Watch
from dash_train.training.totals import Totals

Batch = dict[str, Tensor]


def optimizer_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    world: World,
    context: Context,
    totals: Totals,
    enter: Callable[[str], None],
    watch: Watch | None = None,
) -> Tensor:
    """One optimizer step, with the gradient of the mean loss over all counted tokens of the global batch.

    Args:
        engine: DeepSpeed's, with the learning rate of the step.
        micro_batches: of this rank's rows, on the CPU: `tokens`, `labels` `[rows, seq]` and what else the model takes.
        context: the ranks that share the rows; each counts its own part of the labels.
        totals: gets the outputs of every micro-batch, not yet reduced over the ranks.
        enter: is told of every phase that begins: forward, backward, optimizer.
        watch: handed to the model's forwards.

    Returns:
        The counted tokens of all ranks, at least 1, on the device.
    """
    counts = [int((context.share(micro["labels"]) != IGNORE).sum()) for micro in micro_batches]
    step_tokens = sum_over_ranks(torch.tensor(float(sum(counts)), device=world.device)).clamp(min=1)
    for micro, tokens in zip(micro_batches, counts, strict=True):
        enter("forward")
        outputs = engine(**to_device(micro, world.device), watch=watch)
        # DeepSpeed averages gradients over the ranks; the loss is a sum over tokens.
        enter("backward")
        engine.backward(outputs["loss"] * (world.size / step_tokens), scale_wrt_gas=False)
        totals.add(outputs, tokens)
    enter("optimizer")
    engine.step()
    return step_tokens


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies every tensor, without waiting for it where it lies in pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
