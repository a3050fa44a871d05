"""How much the loss pulls at the router: norms of the gradients that only the router brings about, per layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_train.distributed.world import World, sum_over_ranks
from dash_train.kernels.dash import router_gradient
from dash_train.model.attention import Attention
from dash_train.model.transformer import LanguageModel


class RouterGradients:
    """Of one step: its forwards get `watch=gradients.watch`, then come the `norms()`."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        self.world = world
        self.context = model.context
        self.layers = [module for module in model.modules() if isinstance(module, Attention)]
        self.q_squares = torch.zeros(len(self.layers), dtype=torch.float64, device=world.device)
        shape = (len(self.layers), model.config.kv_heads, model.config.head_dim)
        self.chunk_query = torch.zeros(shape, dtype=torch.float64, device=world.device)

    def norms(self) -> dict[str, list[float | None]]:
        """Norms of the whole step's gradient, over all ranks: of q through the router, and of chunk_query."""
        size = self.world.size  # the loss is scaled up by it, since DeepSpeed averages
        q_norms = (sum_over_ranks(self.q_squares) / size**2).sqrt().tolist()
        chunk_query_norms = (sum_over_ranks(self.chunk_query) / size).flatten(1).norm(dim=1).tolist()
        routes = [layer.attention_type == "dash" for layer in self.layers]
        return {
            "router_grad_norm_q": [norm if on else None for norm, on in zip(q_norms, routes, strict=True)],
            "grad_norm_chunk_query": [norm if on else None for norm, on in zip(chunk_query_norms, routes, strict=True)],
        }

    def watch(
        self,
        layer: int,
        tensors: tuple[Tensor, ...],
        make_router_q: Callable[[Tensor], Tensor],
        options: dict[str, Any],
    ) -> None:
        """Adds up over the backward pass of one layer's forward: what `LanguageModel.forward` calls."""
        *inputs, out = tensors
        inputs = [tensor.detach() for tensor in inputs]

        def add(dout: Tensor) -> None:
            dq, dchunk_query = router_gradient(dout, *inputs, make_router_q=make_router_q, **options)
            self.q_squares[layer] += dq.double().square().sum()
            self.context.own_heads(self.chunk_query[layer]).add_(dchunk_query)

        if out.requires_grad:
            out.register_hook(add)
