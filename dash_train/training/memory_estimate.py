"""How much memory a rank of a run takes, counted from the recipe: good to a fifth, before fragmentation."""

from collections.abc import Iterator

import torch

from dash_train.recipe.schema import Recipe

CHUNKED = 2**29  # bytes of logits and MLP rows that stand at a time (model/loss.py, model/transformer.py)


def state_bytes(recipe: Recipe, parameters: int, ranks: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer state on a rank's device, and in its host memory."""
    stage, fp32 = recipe.parallel.zero_stage, recipe.train.precision == "fp32"
    weights = parameters * (4 if fp32 else 2) // (ranks if stage == 3 else 1)
    gradients = parameters * 4 // (ranks if stage >= 2 else 1)
    per_parameter = 8 + (0 if fp32 and stage in (0, 3) else 4) + (4 if recipe.optimizer.ema else 0)
    optimizer = parameters * per_parameter // (ranks if stage else 1)
    device, host = weights + gradients, 0
    if recipe.parallel.offload_optimizer == "cpu":
        host += optimizer
    else:
        device += optimizer
    if recipe.parallel.offload_parameters == "cpu":
        device, host = device - weights, host + weights
    return device, host


def activation_bytes(recipe: Recipe) -> int:
    """Bytes of what a micro-batch keeps for its backward pass, one block computed again included."""
    model, train = recipe.model, recipe.train
    tokens = train.micro_batch_size * train.seq // recipe.parallel.context
    width = 4 if train.precision == "fp32" else 2
    projected = (model.heads + 2 * model.kv_heads) * model.head_dim
    attended = model.heads * model.head_dim
    block = tokens * width * (4 * model.hidden_size + 2 * projected + attended + 3 * model.mlp_size)
    kept = {
        "none": block,
        "selective": tokens * width * (model.hidden_size + attended),
        "full": tokens * width * model.hidden_size,
    }[train.activation_checkpointing]
    again = 0 if train.activation_checkpointing == "none" else block
    return (0 if train.activation_offload else model.layers * kept) + again + CHUNKED


def estimate(recipe: Recipe, parameters: int, ranks: int) -> Iterator[str]:
    """Lines that say so."""
    device, host = state_bytes(recipe, parameters, ranks)
    activations = activation_bytes(recipe)
    there = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        there = f"; the GPU has {total / 1e9:.0f} GB" + ("" if device + activations < total else ": TOO LITTLE")
    yield (
        f"memory of a rank, about: {device / 1e9:.2f} GB of weights, gradients and optimizer state, "
        f"{activations / 1e9:.2f} GB of activations{there}"
    )
    copies = 12 * parameters // ranks if recipe.checkpoint.asynchronous else 0
    if host or copies:
        yield f"  in host memory: {host / 1e9:.2f} GB of offloaded state, {copies / 1e9:.2f} GB of a checkpoint's copy"
