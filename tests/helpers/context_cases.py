"""A model whose rows several ranks share against the same model with rows of its own."""

import itertools

import pytest
import torch
import torch.distributed as dist

from dash_train.distributed.world import World
from dash_train.inference.generation import generate
from dash_train.model.config import ModelConfig
from dash_train.model.context import Context
from dash_train.model.transformer import STATISTICS, LanguageModel
from dash_train.training.router_gradients import RouterGradients

SEQ = 512  # pieces of four ranks hold whole tiles, so that the union factor too is the same
ATTENTION = {
    "dash": {"chunk_size": 16, "routing_scale": 8.0},
    # Blocks shorter than a tile, of a window that reaches through all of the piece before; and longer ones.
    "blocks": {"chunk_size": 16, "routing_scale": 8.0, "routing_block": [2, 16], "routing_window": [65, 4]},
    "full": {"type": "full"},
}


def compare_with_whole_rows(rank: int, ranks: int) -> None:
    """Losses, statistics and gradients added up over the ranks; logits and generation, for which rows stay whole."""
    tokens = torch.randint(64, (2, SEQ), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, SEQ, dtype=torch.int32)
    starts[0, 192:] = 192
    real = torch.ones(2, SEQ, dtype=torch.bool)
    real[1, 400:] = False
    labels = torch.where(real, tokens.roll(-1, 1), -100)
    documents = [{}, {"document_starts": starts, "real": real}]
    for attention, method, rows in itertools.product(("dash", "blocks", "full"), ("gather", "ulysses"), documents):
        context = Context(rank, ranks, method, dist.group.WORLD)
        whole, shared = build(attention, Context()), build(attention, context)
        worlds = (World(rank, 1, tokens.device), World(rank, ranks, tokens.device))
        watches = [RouterGradients(model, world) for model, world in zip((whole, shared), worlds, strict=True)]
        expected, found = (
            model(tokens, labels=labels, **rows, watch=gradients.watch)
            for model, gradients in zip((whole, shared), watches, strict=True)
        )
        assert torch.equal(context.share(labels) == -100, found["token_losses"] == 0)
        torch.testing.assert_close(found["token_losses"], context.share(expected["token_losses"]), atol=1e-5, rtol=1e-5)
        for name in ("loss", *STATISTICS):
            total = found[name].detach().clone()
            dist.all_reduce(total, op=dist.ReduceOp.MAX if name == "residual" else dist.ReduceOp.SUM)
            torch.testing.assert_close(total, expected[name].detach(), atol=1e-6, rtol=1e-6, msg=f"{attention} {name}")
        expected["loss"].backward()
        (found["loss"] * ranks).backward()  # as the trainer scales it: DeepSpeed averages
        if attention != "full":
            one, several = watches
            norms = several.norms()
            expected_norms = [one.q_squares.sqrt().tolist(), one.chunk_query.flatten(1).norm(dim=1).tolist()]
            for name, values in zip(("router_grad_norm_q", "grad_norm_chunk_query"), expected_norms, strict=True):
                assert norms[name] == pytest.approx(values, rel=1e-4), name
        for (name, parameter), mine in zip(whole.named_parameters(), shared.parameters(), strict=True):
            dist.all_reduce(mine.grad.div_(ranks))
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(mine.grad / scale, parameter.grad / scale, atol=1e-5, rtol=0, msg=name)
        with torch.no_grad():
            assert torch.equal(shared(tokens, **rows)["logits"], whole(tokens, **rows)["logits"])
        prompts = [[1, 2, 3], list(range(40))]
        assert list(generate(shared, prompts, max_new_tokens=3)) == list(generate(whole, prompts, max_new_tokens=3))


def build(attention: str, context: Context) -> LanguageModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, hidden_size=32, heads=8, kv_heads=4, head_dim=16, mlp_size=48, vocab_size=64, init_std=0.2,
        qk_norm=True, attention=ATTENTION[attention],
    )  # fmt: skip
    model = LanguageModel(config, activation_checkpointing="full", context=context)
    for name, parameter in model.named_parameters():
        if name.endswith("chunk_query"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model
