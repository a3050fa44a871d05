"""The means of router_queries in Triton, as two operators of torch.library: the forward and the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_train.kernels.common.launch import launch
from dash_train.kernels.common.numbers import power_of_two
from dash_train.kernels.common.operators import differentiate, operator

MAX_WIDTH = 2048  # numbers of a token, all heads, that a program works on


@operator("router_means")
def means_operator(
    q: Tensor, before: Tensor | None, document_starts: Tensor, query_starts: Sequence[int], block: int, window: int
) -> Tensor:
    """router_queries of checked arguments; document_starts [batch or 1, seq].

    `before` may be None where every piece begins at position 0.
    """
    batch, q_len, heads, head_dim = q.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    before = None if before is None else before.contiguous()
    out = q.new_empty(batch, -(-q_len // block), heads, head_dim)
    piece = q_len // len(query_starts)
    blocks = -(-piece // block)
    sizes = _sizes(heads * head_dim)
    for i, position in enumerate(query_starts):
        launch(
            mean_kernel,
            (blocks, -(-heads * head_dim // sizes["WIDTH"]), batch),
            q,
            before,
            document_starts,
            out,
            *q.stride()[:3],
            document_starts.stride(0) if document_starts.shape[0] > 1 else 0,
            len(query_starts),
            i,
            piece,
            position,
            window,
            heads * head_dim,
            HEAD_DIM=head_dim,
            BLOCK=block,
            **sizes,
        )
    return out


@operator("router_means_backward")
def means_backward_operator(
    dout: Tensor,
    has_before: bool,
    document_starts: Tensor,
    query_starts: Sequence[int],
    q_len: int,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of `before`, the latter empty where there is none."""
    batch, _, heads, head_dim = dout.shape
    dout = dout.contiguous()
    pieces = len(query_starts)
    dq = dout.new_empty(batch, q_len, heads, head_dim)
    dbefore = dout.new_empty((batch, pieces, window - 1, heads, head_dim) if has_before else 0)
    piece = q_len // pieces
    sizes = _sizes(heads * head_dim)
    for i, position in enumerate(query_starts):
        targets = [(dq, 0, piece, q_len, i * piece)]
        if has_before:
            targets.append((dbefore, 1 - window, window - 1, pieces * (window - 1), i * (window - 1)))
        for gradient, first_token, tokens, row_tokens, first_row in targets:
            launch(
                spread_kernel,
                (tokens, -(-heads * head_dim // sizes["WIDTH"]), batch),
                dout,
                document_starts,
                gradient,
                document_starts.stride(0) if document_starts.shape[0] > 1 else 0,
                dout.shape[1],
                i * -(-piece // block),
                -(-piece // block),
                position,
                first_token,
                row_tokens,
                first_row,
                window,
                heads * head_dim,
                BLOCK=block,
                **sizes,
            )
    return dq, dbefore


def _sizes(numbers: int) -> dict[str, int]:
    """How a token's numbers are divided among programs."""
    width = min(MAX_WIDTH, power_of_two(numbers))
    return {"WIDTH": width, "num_warps": max(1, min(4, width // 256))}


@torch.library.register_fake(means_operator)
def _(
    q: Tensor, before: Tensor | None, document_starts: Tensor, query_starts: Sequence[int], block: int, window: int
) -> Tensor:
    return q.new_empty(q.shape[0], -(-q.shape[1] // block), *q.shape[2:])


@torch.library.register_fake(means_backward_operator)
def _(
    dout: Tensor,
    has_before: bool,
    document_starts: Tensor,
    query_starts: Sequence[int],
    q_len: int,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = dout.shape
    before = (batch, len(query_starts), window - 1, heads, head_dim) if has_before else (0,)
    return dout.new_empty(batch, q_len, heads, head_dim), dout.new_empty(before)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, before, document_starts, query_starts, *numbers = inputs
    ctx.save_for_backward(document_starts)
    ctx.options = before is not None, query_starts, (q.shape[1], *numbers)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    has_before, query_starts, numbers = ctx.options
    dq, dbefore = _call_backward(dout, has_before, *ctx.saved_tensors, query_starts, *numbers)
    return dq, dbefore if has_before else None, None, None, None, None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "router_queries with backend='triton' has no second derivative: leave out create_graph=True, or use "
        "backend='reference'"
    )


router_means = differentiate(means_operator, _save, _backward)
_call_backward = differentiate(means_backward_operator, lambda ctx, inputs, output: None, _no_second_derivative)


@triton.jit
def mean_kernel(
    q_ptr,
    before_ptr,
    document_starts_ptr,
    out_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    documents_stride,
    pieces,
    piece,
    piece_tokens,
    position,
    window,
    numbers,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a routing block of a piece and WIDTH numbers of its query: the mean of the last queries up to it."""
    block = tl.program_id(0)
    number = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    batch = tl.program_id(2).to(tl.int64)
    is_number = number < numbers
    token = block * BLOCK  # within the piece, as all tokens here
    start = tl.load(document_starts_ptr + batch * documents_stride + position + token)
    count = tl.minimum(window, position + token - start + 1)
    q_ptr += batch * q_batch_stride + number // HEAD_DIM * q_head_stride + number % HEAD_DIM
    total = tl.zeros([WIDTH], tl.float32)
    for back in range(tl.minimum(count, token + 1)):
        row = (piece * piece_tokens + token - back).to(tl.int64)
        total += tl.load(q_ptr + row * q_token_stride, mask=is_number, other=0.0).to(tl.float32)
    if before_ptr is not None:
        for back in range(token + 1, count):
            row = (batch * pieces + piece) * (window - 1) + window - 1 + token - back
            total += tl.load(before_ptr + row * numbers + number, mask=is_number, other=0.0).to(tl.float32)
    row = (batch * pieces + piece) * tl.num_programs(0) + block
    tl.store(out_ptr + row * numbers + number, (total / count).to(out_ptr.dtype.element_ty), mask=is_number)


@triton.jit
def spread_kernel(
    dout_ptr,
    document_starts_ptr,
    gradient_ptr,
    documents_stride,
    row_blocks,
    first_block,
    blocks,
    position,
    first_token,
    row_tokens,
    first_row,
    window,
    numbers,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a token, counted from its piece's first, and WIDTH numbers: the sum over the windows it lies in."""
    token = first_token + tl.program_id(0)
    number = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    batch = tl.program_id(2).to(tl.int64)
    is_number = number < numbers
    total = tl.zeros([WIDTH], tl.float32)
    last = tl.minimum((token + window - 1) // BLOCK, blocks - 1)
    for block in range(tl.cdiv(tl.maximum(token, 0), BLOCK), last + 1):
        end = block * BLOCK
        start = tl.load(document_starts_ptr + batch * documents_stride + position + end)
        count = tl.minimum(window, position + end - start + 1)
        if end - token < count:
            row = batch * row_blocks + first_block + block
            total += tl.load(dout_ptr + row * numbers + number, mask=is_number, other=0.0).to(tl.float32) / count
    row = batch * row_tokens + first_row + tl.program_id(0)
    tl.store(gradient_ptr + row * numbers + number, total.to(gradient_ptr.dtype.element_ty), mask=is_number)
