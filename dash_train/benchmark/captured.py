"""Queries, keys and values of a trained model, kept in a file for measuring vAttention on them.

Tensors are named CONTEXT.LAYER.NAME: q [queries, heads, head_dim], k and v [context, kv_heads, head_dim], lengths
[queries]; of Dash layers also summaries [chunks, kv_heads, head_dim] and chunk_bias [queries, kv_heads, chunks].
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dash_train.benchmark.populations import Problem
from dash_train.kernels.dash import chunk_summaries
from dash_train.kernels.dash.stages import DashConfig, Rows, group_heads, log_prior, route_rows, whole_chunks
from dash_train.model.attention import Attention
from dash_train.model.transformer import LanguageModel

CONTEXTS = (4096, 8192, 16384)
QUERIES = 64  # of a layer and head: the positions CONTEXT - 1, CONTEXT - 1 - STRIDE, ...
STRIDE = 8


@torch.no_grad()
def capture(model: LanguageModel, tokens: Tensor, path: Path, contexts: tuple[int, ...] = CONTEXTS) -> None:
    """Runs the model on the first tokens of a text, [at least max(contexts)] int64, and writes the file."""
    tensors: dict[str, Tensor] = {}
    for context in contexts:
        hooks = []
        for index, block in enumerate(model.model.layers):
            attention = block.get_submodule("self_attn")

            def keep(module: Any, inputs: tuple[Any, ...], prefix: str = f"{context}.{index}.") -> None:
                found = _problem(module, *inputs[:2])
                tensors.update({prefix + name: x.contiguous().cpu() for name, x in found.items()})

            hooks.append(attention.register_forward_pre_hook(keep))
        device = next(model.parameters()).device
        model(tokens[None, :context].to(device), labels=torch.full((1, context), -100, device=device))
        for hook in hooks:
            hook.remove()
    save_file(tensors, path)


def _problem(attention: Attention, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    q, k, v = attention.queries_keys_values(hidden, rotary)
    context = k.shape[1]
    position = context - 1 - STRIDE * torch.arange(QUERIES, device=k.device)
    found = {"q": q[0, position], "k": k[0], "v": v[0], "lengths": (position + 1).int()}
    if attention.attention_type == "dash":
        config = DashConfig(**attention._routing())
        k = whole_chunks(k, config.chunk_size)
        summaries = chunk_summaries(k.transpose(1, 2), attention.chunk_query, chunk_size=config.chunk_size)
        start = torch.zeros_like(position)[None]
        grouped_q = group_heads(q[:, position], k.shape[1])
        rows = Rows(grouped_q, k, k, summaries.transpose(1, 2), position[None], start, support=None)
        prior, _ = log_prior(route_rows(rows, config), config)
        own = torch.arange(prior.shape[-1], device=k.device) == position[:, None] // config.chunk_size
        found["summaries"] = summaries[0]
        found["chunk_bias"] = prior[0].masked_fill(own, 0).transpose(0, 1)
    return found


def captured_problems(path: Path, device: str, block_rows: int) -> Iterator[tuple[str, Iterator[Problem]]]:
    """For each context its name and its problems, of all layers, at most block_rows queries each, in fp32."""
    tensors = load_file(path)
    for context in sorted({int(name.split(".")[0]) for name in tensors}):
        layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith(f"{context}.")})
        prefixes = [f"{context}.{layer}." for layer in layers]
        yield f"context {context}", _problems(tensors, prefixes, device, block_rows)


def _problems(tensors: dict[str, Tensor], prefixes: list[str], device: str, block_rows: int) -> Iterator[Problem]:
    for prefix in prefixes:
        found = {name[len(prefix) :]: x.to(device) for name, x in tensors.items() if name.startswith(prefix)}
        found = {name: x if name == "lengths" else x.float() for name, x in found.items()}
        for rows in torch.arange(len(found["q"])).split(block_rows):
            shared = {
                name: found[name].expand(len(rows), *found[name].shape)
                for name in ("k", "v", "summaries")
                if name in found
            }
            own = {name: found[name][rows.to(device)] for name in ("q", "lengths", "chunk_bias") if name in found}
            yield Problem(**shared, **own)
