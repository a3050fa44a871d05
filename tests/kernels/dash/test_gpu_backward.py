"""The Triton backward pass on a GPU: pytest -m gpu tests/kernels"""

import itertools

import pytest
import torch
from dash_cases import TOLERANCE, VALUES, Case, call, covering_array, gradient_errors, grid, in_processes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dash_train.kernels.dash import dash_attention
from dash_train.kernels.dash.triton.operator import forward_operator

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

CASES = covering_array()


def gradients(tensors: list[Tensor], options: dict) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = dash_attention(*inputs, **options, backend="triton")
    return torch.autograd.grad(out.float().square().sum(), inputs)


def check(tensors: list[Tensor], options: dict) -> None:
    for name, error in gradient_errors(tensors, options).items():
        assert error < TOLERANCE[tensors[0].dtype], name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_reference(case):
    check(*call(case, 11, "cuda"))


def test_scores_computed_again():
    """1,100 chunks."""
    (q, *others), options = call(Case(dtype=torch.bfloat16, head_dim=64, group=4, documents=True), 1100, "cuda")
    check([q[:, 1096 * 16 :], *others], options | {"query_starts": (1096 * 16,)})


def test_a_first_chunk_that_everyone_attends_to():
    """Its tiles are more than one piece of work."""
    (q, k, v, w), options = call(Case(dtype=torch.bfloat16, head_dim=128, group=16, chunk_size=64), 40, "cuda", batch=1)
    q[..., 0], k[:, :64, :, 0] = 8.0, 8.0
    check([q, k, v, w], options)


def test_pieces_of_queries():
    (q, k, v, w), options = call(Case(dtype=torch.bfloat16, group=16, chunk_size=64), 20, "cuda")
    pieces = torch.cat([q[:, 320:480], q[:, 960:1120]], 1)
    check([pieces, k, v, w], options | {"query_starts": (320, 960)})


@pytest.mark.parametrize("block", [1, 16, 64])
def test_repeats_are_equal_to_the_bit(block):
    case = Case(dtype=torch.bfloat16, head_dim=128, group=16, chunk_size=64, routing_block=block)
    tensors, options = call(case, 150, "cuda")
    for one, other in zip(gradients(tensors, options), gradients(tensors, options), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block", [1, 16])
def test_the_host_never_waits(block):
    tensors, options = call(Case(dtype=torch.bfloat16, group=4, routing_block=block), 20, "cuda")
    gradients(tensors, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(tensors, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.alone
def test_extra_memory_at_131072_tokens():
    """At any density: at most 1 GiB beyond the inputs, the output and their gradients."""
    q = torch.randn(1, 2**17, 32, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 2**17, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    w = torch.zeros(2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(q)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = dash_attention(q, k, v, w, routing_scale=16.0, backend="triton")
    torch.autograd.grad(out, (q, k, v, w), upstream)
    accounted = sum(t.nbytes for t in (out, q, k, v))
    assert torch.cuda.max_memory_allocated() - before - accounted <= 2**30


def test_as_an_operator():
    """Fake kernels, autograd registration, compiled and checkpointed: the same bits."""
    tensors, options = call(Case(dtype=torch.bfloat16, group=4), 20, "cuda")
    numbers = (options["chunk_size"], options["routing_scale"], options["prior_normalizer"], 1.5)
    inputs = [t.requires_grad_() for t in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*inputs, None, options["document_starts"], (0,), *numbers, 1)
    torch.library.opcheck(forward_operator, arguments, test_utils=tests)

    def plain(*inputs: Tensor) -> Tensor:
        return dash_attention(*inputs, **options, backend="triton").float().square().sum()

    expected = torch.autograd.grad(plain(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(plain, fullgraph=True)(*tensors), tensors)
    again = torch.autograd.grad(checkpoint(plain, *tensors, use_reentrant=False), tensors)
    for one, two, three in zip(expected, compiled, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.alone
def test_a_million_tokens():
    """Forward and backward pass with 16/2 heads on one 80 GB card."""
    q = torch.randn(1, 2**20, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 2**20, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    w = torch.zeros(2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out, stats = dash_attention(q, k, v, w, routing_scale=64.0, backend="triton", return_stats=True)
    assert stats.density < 0.05
    assert stats.residual <= 1e-6
    for gradient in torch.autograd.grad(out, (q, k, v, w), torch.randn_like(out)):
        assert gradient.isfinite().all() and gradient.any()


def failures(cases: list[Case]) -> list[str]:
    """What went wrong in which case: one that raises does not keep the others from being checked."""
    found = []
    for case in cases:
        torch.manual_seed(0)  # the same draw in whichever process
        try:
            errors = gradient_errors(*call(case, 7, "cuda"))
        except Exception as error:
            found.append(f"{case}: {type(error).__name__}: {error}")
            continue
        if not all(error < TOLERANCE[case.dtype] for error in errors.values()):
            found.append(f"{case}: {errors}")
    torch.cuda.empty_cache()
    return found


@pytest.mark.grid
@pytest.mark.parametrize("dtype", VALUES["dtype"], ids=str)
def test_gradients_over_the_full_grid(dtype):
    """17,640 cases: pytest -m "gpu and grid", in as many calls as it takes."""
    by_kernels = itertools.groupby((case for case in grid() if case.dtype == dtype), key=lambda case: case[:4])
    shares = [list(cases) for _, cases in by_kernels]
    assert len(shares) == 140
    # The largest first, so that none of them is left over at the end.
    shares.reverse()
    assert [failure for found in in_processes(failures, shares) for failure in found] == []
