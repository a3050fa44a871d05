"""The Triton backward pass and the operator in Triton's interpreter, on the CPU and tiny inputs."""

from functools import partial
from typing import Any

import pytest
import torch
from dash_cases import TOLERANCE, Case, call, gradient_errors
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.triton.forward import Forward, dash_forward
from dash_train.kernels.dash.triton.operator import forward_operator
from dash_train.kernels.dash.triton.router_means import means_operator, router_means

CASES = [
    Case(group=4, ragged=True),
    Case(group=6, head_dim=48, chunk_size=32, normalizer="peak", documents=True),
    Case(group=16, head_dim=64, normalizer="none", documents=True, ragged=True),
    Case(group=1, chunk_size=128, ragged=True),
    Case(group=2, dtype=torch.float16),
    Case(group=4, routing_block=4, ragged=True),
    Case(group=16, head_dim=48, chunk_size=32, routing_block=16, normalizer="peak", documents=True, ragged=True),
    Case(group=6, routing_block=16, normalizer="none", ragged=True),
    Case(group=32, chunk_size=64, routing_block=64),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Chunks listed by three tiles or more go to slots; the interpreter takes its time for every program."""
    monkeypatch.setattr("dash_train.kernels.dash.triton.pieces.SLOTS", 16)
    monkeypatch.setattr("dash_train.kernels.dash.triton.pieces.MIN_PIECE", 2)
    monkeypatch.setattr("dash_train.kernels.dash.triton.routing_backward.PROGRAMS", 8)


def gradients(tensors: list[Tensor], options: dict) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = dash_attention(*inputs, **options, backend="triton")
    return torch.autograd.grad(out.square().sum(), inputs)


def check(tensors: list[Tensor], options: dict) -> None:
    for name, error in gradient_errors(tensors, options).items():
        assert error < TOLERANCE[tensors[0].dtype], name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_reference(case):
    check(*call(case, 6, "cpu", batch=2 if case.documents else 1))


@pytest.mark.parametrize("block", [1, 16])
def test_pieces_of_queries(block):
    (q, k, v, w), options = call(Case(group=4, routing_block=block), 8, "cpu", batch=1)
    if block > 1:
        options["router_q"] = options["router_q"][:, [2, 3, 6, 7]]
    check([torch.cat([q[:, 32:64], q[:, 96:128]], 1), k, v, w], options | {"query_starts": (32, 96)})


def test_scores_computed_again(streamed):
    (q, *others), options = call(Case(group=8, head_dim=16, ragged=True), 30, "cpu", batch=1, kv_heads=1)
    check([q[:, 29 * 16 :], *others], options | {"query_starts": (29 * 16,)})


def test_a_first_chunk_that_everyone_attends_to():
    (q, k, v, w), options = call(Case(group=16), 8, "cpu", batch=1)
    q[..., 0], k[:, :16, :, 0] = 4.0, 4.0
    check([q, k, v, w], options)


def test_routing_gets_no_gradient_from_a_single_chunk():
    tensors, options = call(Case(ragged=True), 1, "cpu", batch=1)
    check(tensors, options)
    assert not gradients(tensors, options)[3].any()


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("limit", [{"WORKSPACE_BYTES": 4000}, {"QUERY_NUMBERS": 4096}], ids=str)
def test_segments_agree_and_repeats_are_equal_to_the_bit(change_tiles, block, limit):
    tensors, options = call(Case(group=4, routing_block=block), 8, "cpu", batch=1)
    whole = gradients(tensors, options)
    change_tiles(**limit)
    pieces, again = gradients(tensors, options), gradients(tensors, options)
    for one, other, repeated in zip(whole, pieces, again, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
        assert torch.equal(other, repeated)


def test_operators_are_well_formed():
    (q, k, v, w), options = call(Case(head_dim=16), 3, "cpu", batch=1, kv_heads=1)
    inputs = [t.requires_grad_() for t in (q, k, v, w)]
    means = router_means(q, None, options["document_starts"], [0], 4, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for router_q, block in ((None, 1), (means.detach().requires_grad_(), 4)):
        arguments = (*inputs, router_q, options["document_starts"], [0], 16, 12.0, "peak", 1.5, block)
        torch.library.opcheck(forward_operator, arguments, test_utils=tests)
    before = torch.randn(1, 1, 2, *q.shape[2:], requires_grad=True)
    arguments = (inputs[0], before, options["document_starts"], [0], 4, 3)
    torch.library.opcheck(means_operator, arguments, test_utils=tests)


def test_compiles_into_one_graph():
    tensors, options = call(Case(head_dim=16), 3, "cpu", batch=1, kv_heads=1)
    expected = gradients(tensors, options)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attention(*inputs: Tensor) -> Tensor:
        return dash_attention(*inputs, **options, backend="triton")

    inputs = [t.detach().requires_grad_() for t in tensors]
    for gradient, truth in zip(torch.autograd.grad(attention(*inputs).square().sum(), inputs), expected, strict=True):
        assert torch.equal(gradient, truth)


@pytest.mark.parametrize("kept", [False, True], ids=["computed again", "kept"])
def test_activation_checkpointing(kept, monkeypatch):
    tensors, options = call(Case(head_dim=16), 3, "cpu", batch=1, kv_heads=1)
    expected = gradients(tensors, options)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Forward:
        calls.append(1)
        return dash_forward(*args, **kwargs)

    monkeypatch.setattr("dash_train.kernels.dash.triton.operator.dash_forward", counted)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = kept and operator == torch.ops.dash_train.dash_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*inputs: Tensor) -> Tensor:
        return dash_attention(*inputs, **options, backend="triton").square().sum()

    inputs = [t.detach().requires_grad_() for t in tensors]
    contexts = partial(create_selective_checkpoint_contexts, policy)
    loss = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    for gradient, truth in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert torch.equal(gradient, truth)
    assert len(calls) == (1 if kept else 2)


def test_a_second_derivative_is_refused():
    tensors, options = call(Case(head_dim=16), 3, "cpu", batch=1, kv_heads=1)
    inputs = [t.requires_grad_() for t in tensors]
    out = dash_attention(*inputs, **options, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='triton' has no second derivative"):
        gradient.sum().backward()
