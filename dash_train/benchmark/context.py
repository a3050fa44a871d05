"""Attention of a row that several GPUs share (`parallel.context`) against the same row on one of them."""

from dataclasses import asdict

import torch
from torch import Tensor

from dash_train.benchmark.timing import extra_memory, milliseconds
from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.stages import DashConfig
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.parallel import World, join_context, max_over_ranks
from dash_train.recipe import ParallelConfig


def context_row(
    world: World, q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor, config: DashConfig
) -> dict[str, float]:
    """Milliseconds of forward and backward pass, the exchange of K, V and their gradients included; the slowest rank.

    All ranks bring the same whole rows.
    """
    shared = join_context(world, ParallelConfig(context=world.size))
    row: dict[str, float] = {"ranks": world.size}
    for name, context in (("one_gpu", WHOLE_ROWS), ("shared", shared)):
        leaves = [context.share(t).detach().clone().requires_grad_() for t in (q, k, v)]
        tensors = (*leaves, chunk_query.detach().clone().requires_grad_())
        upstream = torch.randn_like(leaves[0])

        def whole(
            context: Context = context, tensors: tuple[Tensor, ...] = tensors, upstream: Tensor = upstream
        ) -> None:
            torch.autograd.grad(attend(context, config, *tensors), tensors, upstream)

        row[f"{name}_ms"] = max_over_ranks(torch.tensor(milliseconds(whole), device=q.device)).item()
        row[f"{name}_extra_gib"] = extra_memory(whole)
    row["speedup"] = row["one_gpu_ms"] / row["shared_ms"]
    return row


def attend(context: Context, config: DashConfig, q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor) -> Tensor:
    """The attention of a layer, projections aside."""
    sent = context.send_keys(k), context.send_keys(v)
    k, v = (tensor.receive() for tensor in sent)
    return dash_attention(q, k, v, chunk_query, query_starts=context.query_starts(k.shape[1]), **asdict(config))
