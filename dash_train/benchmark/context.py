"""Attention of a row that several GPUs share (`parallel.context`) against the same row on one of them."""

import torch
from torch import Tensor

from dash_train.benchmark.captured import LayerInputs
from dash_train.benchmark.timing import extra_memory, milliseconds
from dash_train.distributed.world import World, join_context, max_over_ranks
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.recipe.schema import ParallelConfig


def context_row(world: World, inputs: LayerInputs) -> dict[str, float]:
    """Milliseconds of forward and backward pass, the exchange of K, V and their gradients included; the slowest rank.

    All ranks bring the same whole rows.
    """
    shared = join_context(world, ParallelConfig(context=world.size))
    row: dict[str, float] = {"ranks": world.size}
    for name, context in (("one_gpu", WHOLE_ROWS), ("shared", shared)):
        q, k, v = (context.share(t) for t in inputs[:3])
        leaves = inputs._replace(q=q, k=k, v=v).leaves()
        upstream = torch.randn_like(q)

        def whole(context: Context = context, leaves: LayerInputs = leaves, upstream: Tensor = upstream) -> None:
            torch.autograd.grad(attend(context, leaves), leaves.tensors(), upstream)

        row[f"{name}_ms"] = max_over_ranks(torch.tensor(milliseconds(whole), device=world.device)).item()
        row[f"{name}_extra_gib"] = extra_memory(whole)
    row["speedup"] = row["one_gpu_ms"] / row["shared_ms"]
    return row


def attend(context: Context, inputs: LayerInputs) -> Tensor:
    """The attention of a layer, projections aside."""
    sent = context.send_keys(inputs.k), context.send_keys(inputs.v)
    k, v = (tensor.receive() for tensor in sent)
    before = context.queries_before(inputs.q, inputs.window - 1)
    return inputs._replace(k=k, v=v).dash_attention(context.query_starts(k.shape[1]), before)
