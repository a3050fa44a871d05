"""Write queries, keys and values of a trained model's layers on a text to a file: attention is timed on them
(`attention --captured`), vAttention measured (`coverage --captured`).

Tensors are named LAYER.NAME: q [rows, seq, heads, head_dim], k and v [rows, seq, kv_heads, head_dim], and of Dash
layers chunk_query [kv_heads, head_dim]. The metadata holds, by LAYER, how such a layer routes, as JSON.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_train.benchmark.populations import Problem
from dash_train.errors import UserError
from dash_train.inference.trained import load_trained
from dash_train.kernels.dash import chunk_summaries, dash_attention, router_queries
from dash_train.kernels.dash.config import DashConfig
from dash_train.kernels.dash.reference.stages import Rows, group_heads, log_prior, route_rows, whole_chunks
from dash_train.model.attention import Attention
from dash_train.model.loss import IGNORE
from dash_train.model.transformer import LanguageModel

CONTEXTS = (4096, 8192, 16384)
QUERIES = 64  # of a layer, row and head: the positions CONTEXT - 1, CONTEXT - 1 - STRIDE, ...
STRIDE = 8


class LayerInputs(NamedTuple):
    """What the attention of one layer works on; a layer of full attention has no chunk_query, routing or window."""

    q: Tensor
    k: Tensor
    v: Tensor
    chunk_query: Tensor | None
    routing: dict[str, Any]  # keywords of dash_attention
    window: int  # queries in a router's mean

    def dash_attention(self, query_starts: tuple[int, ...] = (0,), before: Tensor | None = None, **options: Any) -> Any:
        """The Dash layer's attention, the routers' queries included; `options` are more keywords of dash_attention."""
        q, k, v, chunk_query = self.tensors()
        router_q: Tensor | None = self.router_q(query_starts, before)
        if router_q is q:
            router_q = None
        more = {**self.routing, **options}
        return dash_attention(q, k, v, chunk_query, router_q=router_q, query_starts=query_starts, **more)

    def leaves(self) -> "LayerInputs":
        """A Dash layer's inputs again, to be differentiated with respect to `tensors()`."""
        q, k, v, chunk_query = (t.detach().requires_grad_() for t in self.tensors())
        return self._replace(q=q, k=k, v=v, chunk_query=chunk_query)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A Dash layer's q, k, v and chunk_query."""
        assert self.chunk_query is not None
        return self.q, self.k, self.v, self.chunk_query

    def router_q(self, query_starts: tuple[int, ...] = (0,), before: Tensor | None = None) -> Tensor:
        """The routers' queries, one a routing block; q itself where they are the tokens' own."""
        return router_queries(self.q, None, query_starts, self.routing["routing_block"], self.window, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py capture`."""
    parser.add_argument("--model", type=Path, required=True, help="the model: an export, a run folder or a checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="a text of at least ROWS x SEQ tokens")
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=4, help="rows of the text that the model reads (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the model on the first tokens of the text and writes the file."""
    trained = load_trained(args.model)
    tokens = torch.tensor(trained.tokenizer.encode(args.text.read_text()))
    wanted = args.rows * args.seq
    if len(tokens) < wanted:
        raise UserError(f"{args.text}: holds {len(tokens)} tokens, expected at least --rows x --seq = {wanted}")
    capture(trained.model, tokens[:wanted].view(args.rows, args.seq), args.out)
    return {"file": str(args.out), "gib": args.out.stat().st_size / 2**30}


@torch.no_grad()
def capture(model: LanguageModel, rows: Tensor, path: Path) -> None:
    """Runs the model on rows of text, int64 [rows, seq], and writes the file."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}

    def keep(attention: Attention, inputs: tuple[Any, ...]) -> None:
        found = dict(zip(("q", "k", "v"), attention.queries_keys_values(*inputs[:2]), strict=True))
        if attention.attention_type == "dash":
            found["chunk_query"] = attention.chunk_query
            metadata[str(attention.layer)] = json.dumps(_routing(attention))
        tensors.update({f"{attention.layer}.{name}": x.contiguous().cpu() for name, x in found.items()})

    layers = [block.get_submodule("self_attn") for block in model.model.layers]
    hooks = [attention.register_forward_pre_hook(keep) for attention in layers]
    rows = rows.to(model.lm_head.weight.device)
    model(rows, labels=torch.full_like(rows, IGNORE))  # labels that do not count spare it the logits
    for hook in hooks:
        hook.remove()
    save_file(tensors, path, metadata)


def _routing(attention: Attention) -> dict[str, Any]:
    """How a Dash layer routes: keywords of dash_attention, and the window."""
    blocks = {"routing_block": attention.routing_block, "routing_window": attention.routing_window}
    return {**attention.routing(), **blocks}


def captured_layers(path: Path, device: str) -> Iterator[LayerInputs]:
    """The layers of a file, from the first on, each read when it is asked for."""
    with safe_open(path, "pt", device) as file:
        names, metadata = set(file.keys()), file.metadata() or {}
        for layer in range(sum(name.endswith(".q") for name in names)):
            q, k, v = (file.get_tensor(f"{layer}.{name}") for name in "qkv")
            if str(layer) not in metadata:
                yield LayerInputs(q, k, v, None, {}, 0)
                continue
            routing = json.loads(metadata[str(layer)])
            window = routing.pop("routing_window")
            yield LayerInputs(q, k, v, file.get_tensor(f"{layer}.chunk_query"), routing, window)


def captured_problems(path: Path, device: str, block_rows: int) -> Iterator[tuple[str, Iterator[Problem]]]:
    """For each context its name and its problems, of all layers and rows, at most block_rows queries each, in fp32.

    Contexts are the beginnings of the rows: those of CONTEXTS, and whole rows.
    """
    seq = next(captured_layers(path, device)).q.shape[1]
    for context in sorted({seq, *(context for context in CONTEXTS if context < seq)}):
        layers = captured_layers(path, device)
        yield (
            f"context {context}",
            (
                problem
                for layer in layers
                for row in range(len(layer.q))
                for problem in _problems(_beginning(layer, row, context), block_rows)
            ),
        )


def _beginning(layer: LayerInputs, row: int, context: int) -> LayerInputs:
    """One row of a layer, up to `context` tokens, in fp32."""
    q, k, v = (x[row : row + 1, :context].float() for x in layer[:3])
    chunk_query = None if layer.chunk_query is None else layer.chunk_query.float()
    return layer._replace(q=q, k=k, v=v, chunk_query=chunk_query)


def _problems(layer: LayerInputs, block_rows: int) -> Iterator[Problem]:
    context = layer.k.shape[1]
    position = context - 1 - STRIDE * torch.arange(QUERIES, device=layer.k.device)
    summaries, chunk_bias = (None, None) if layer.chunk_query is None else _routed(layer, position)
    for rows in torch.arange(QUERIES, device=position.device).split(block_rows):
        yield Problem(
            q=layer.q[0, position[rows]],
            k=layer.k.expand(len(rows), -1, -1, -1),
            v=layer.v.expand(len(rows), -1, -1, -1),
            lengths=(position[rows] + 1).int(),
            chunk_bias=None if chunk_bias is None else chunk_bias[rows],
            summaries=None if summaries is None else summaries.expand(len(rows), -1, -1, -1),
        )


def _routed(layer: LayerInputs, position: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk summaries [1, chunks, kv_heads, head_dim] and log-priors [positions, kv_heads, chunks]."""
    assert layer.chunk_query is not None
    router_q = layer.router_q()[:, position // layer.routing["routing_block"]]
    config = DashConfig(**layer.routing | {"routing_block": 1})  # for each position by itself
    k = whole_chunks(layer.k, config.chunk_size)
    summaries = chunk_summaries(k.transpose(1, 2), layer.chunk_query, chunk_size=config.chunk_size)
    start = torch.zeros_like(position)[None]
    rows = Rows(group_heads(router_q, k.shape[1]), k, k, summaries.transpose(1, 2), position[None], start, None)
    prior, _ = log_prior(route_rows(rows, config), config)
    own = torch.arange(prior.shape[-1], device=k.device) == position[:, None] // config.chunk_size
    return summaries, prior[0].masked_fill(own, 0).transpose(0, 1)
