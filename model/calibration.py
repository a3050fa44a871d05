"""`routing_scale: auto`: the scale of each Dash layer, from the density that it gives on a run's first rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dash_train.kernels.dash import find_routing_scale, sample_blocks
from dash_train.model.config import ModelConfig
from dash_train.model.rows import Rows
from dash_train.model.transformer import Block, LanguageModel

SAMPLE = 2**14  # routing blocks of all rows together that a search looks at, where there are more


@torch.no_grad()
def calibrate_routing_scale(model: LanguageModel, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Set the routing scales at which the density of these rows is `attention.initial_density` in every Dash layer.

    Layer by layer, each looking at the output of those before it with their new scales; where no scale gives that
    density the layer gets the closest (a density floor is set by heads that disagree). Writes the list, one number a
    layer and 1 for full attention, to `model.config.attention.routing_scale` and returns it. A layer takes one batch at
    a time; what stays are the hidden states of all (in host memory, where the model offloads those) and a layer's keys.

    Args:
        model: also one whose weights DeepSpeed has partitioned; then every rank calls this with the same batches.
        batches: arguments of `LanguageModel.forward`: `tokens`, and `document_starts` and `real` where they matter.
    """
    passing = [_Batch(model, **batch) for batch in batches]
    blocks = _blocks(model)
    for index, block in enumerate(blocks):
        for batch in passing if index else []:
            batch.pass_through(blocks[index - 1])
        if block.self_attn.attention_type == "dash":
            block.self_attn.routing_scale = _find_scale(block, passing)
    for batch in passing:
        batch.release()
    scales = [block.self_attn.routing_scale for block in blocks]
    model.config.attention.routing_scale = scales
    return scales


def set_routing_scales(model: LanguageModel, config: ModelConfig) -> None:
    """Give every layer the routing scale that the configuration names for it."""
    for layer, block in enumerate(_blocks(model)):
        block.self_attn.routing_scale = config.routing_scale(layer)


def _blocks(model: LanguageModel) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


class _Batch:
    """A batch on its way through the blocks."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        document_starts: Tensor | None = None,
        real: Tensor | None = None,
        **_labels: Tensor,
    ) -> None:
        self.transformer, self.context = model.model, model.context
        if real is None:
            real = torch.ones_like(tokens, dtype=torch.bool)
        own_tokens, self.positions, self.rows = self.transformer.rows(tokens, document_starts, real, self.context)
        hidden = self.transformer.embed(own_tokens)
        memory = self.transformer.host_memory
        self.hidden = memory.buffer_like(hidden).copy_(hidden) if memory else hidden

    def block_inputs(self) -> tuple[Tensor, tuple[Tensor, Tensor], Rows]:
        """The arguments of the next block."""
        rotary = self.transformer.rotary(self.positions, self.rows.document_starts)
        return self.hidden.to(self.positions.device), rotary, self.rows

    def pass_through(self, block: Block) -> None:
        """Go on to what comes after the block."""
        self.hidden.copy_(block(*self.block_inputs())[0])

    def release(self) -> None:
        """Give back what the host lent."""
        if self.transformer.host_memory:
            self.transformer.host_memory.free.append(self.hidden)


def _find_scale(block: Block, passing: Sequence[_Batch]) -> float:
    """The scale of a Dash block, from what its router sees of the rows."""
    attention, options = block.self_attn, block.self_attn.config.attention
    sampled = SAMPLE // sum(len(batch.hidden) for batch in passing)
    sizes: dict[str, Any] = {"chunk_size": options.chunk_size, "routing_block": attention.routing_block}
    seen: list[tuple[Tensor, ...]] = []
    common: dict[str, Any] = {}

    def look(
        router_q: Tensor,
        k: Tensor,
        chunk_query: Tensor,
        document_starts: Tensor,
        query_starts: tuple[int, ...],
        real: Tensor,
    ) -> None:
        seq = k.shape[1]
        router_q, real, query_starts = sample_blocks(router_q, real, query_starts, sampled, seq=seq, **sizes)
        seen.append((router_q, k, document_starts, real))
        common.update(chunk_query=chunk_query.clone(), query_starts=query_starts)

    for batch in passing:
        hidden, rotary, rows = batch.block_inputs()
        attention(block.input_layernorm(hidden), rotary, rows, look)
    router_q, k, document_starts, real = map(torch.cat, zip(*seen, strict=True))
    return find_routing_scale(
        router_q,
        k,
        target=options.initial_density,
        document_starts=document_starts,
        real=real,
        add_up=passing[0].context.add_up,
        **sizes,
        **common,
    )
