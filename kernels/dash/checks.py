"""Checks of the arguments of DashAttention, and where Triton can compute it."""

import torch
from torch import Tensor

from dash_train.kernels.common.backend import device_obstacle
from dash_train.kernels.common.checks import (
    check_choice,
    check_dimensions,
    check_group,
    check_same_kind,
    check_shape,
)

PRIOR_NORMALIZERS = ("geometric_mean", "none", "peak")


def triton_obstacle(q: Tensor, chunk_size: int = 64) -> str | None:
    """Why the Triton kernels cannot compute with queries like q; None if they can."""
    head_dim = q.shape[-1]
    if obstacle := device_obstacle(q):
        return obstacle
    if head_dim % 16 or not 16 <= head_dim <= 256:
        return f"needs a head_dim that is a multiple of 16 up to 256, not {head_dim}"
    if chunk_size not in (16, 32, 64, 128):
        return f"needs a chunk_size of 16, 32, 64 or 128, not {chunk_size}"
    return None


def check_heads(q: Tensor, k: Tensor, v: Tensor, chunk_query: Tensor) -> None:
    """The four tensors of dash_attention fit together."""
    check_dimensions("q", q, "batch", "q_len", "heads", "head_dim")
    check_dimensions("k", k, "batch", "seq", "kv_heads", "head_dim")
    check_dimensions("chunk_query", chunk_query, "kv_heads", "head_dim")
    batch, _, heads, head_dim = q.shape
    seq, kv_heads = k.shape[1:3]
    check_shape("k", k, batch=batch, seq=seq, kv_heads=kv_heads, head_dim=head_dim)
    check_shape("v", v, batch=batch, seq=seq, kv_heads=kv_heads, head_dim=head_dim)
    check_shape("chunk_query", chunk_query, kv_heads=kv_heads, head_dim=head_dim)
    check_group(heads, kv_heads)
    check_same_kind("k", k, q)
    check_same_kind("v", v, q)


def check_numbers(chunk_size: int, routing_scale: float, prior_normalizer: str, prior_temperature: float) -> None:
    """The plain numbers of dash_attention and dash_decode."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    if not routing_scale > 0:
        raise ValueError(f"routing_scale is {routing_scale}, expected a number above 0")
    if not prior_temperature > 0:
        raise ValueError(f"prior_temperature is {prior_temperature}, expected a number above 0")
    check_choice("prior_normalizer", prior_normalizer, PRIOR_NORMALIZERS)


def check_block(routing_block: int, chunk_size: int) -> None:
    """Routing blocks are equal parts of a chunk."""
    if routing_block < 1 or routing_block & (routing_block - 1) or chunk_size % routing_block:
        raise ValueError(
            f"routing_block is {routing_block}, expected a power of two that divides chunk_size={chunk_size}"
        )


def check_pieces(q: Tensor, query_starts: tuple[int, ...], name: str, block: int) -> None:
    """q is so many equal pieces, of whole routing blocks if they are several; `name` is the argument `block`."""
    if not query_starts or q.shape[1] % len(query_starts):
        raise ValueError(f"query_starts has {len(query_starts)} pieces, expected a divisor of q_len={q.shape[1]}")
    piece = q.shape[1] // len(query_starts)
    if len(query_starts) > 1 and piece % block:
        raise ValueError(f"query_starts cuts q into pieces of {piece} tokens, expected a multiple of {name}={block}")


def check_router(q: Tensor, router_q: Tensor | None, routing_block: int) -> None:
    """The routers' queries are one a routing block of q."""
    batch, q_len, heads, head_dim = q.shape
    if router_q is not None:
        blocks = -(-q_len // routing_block)
        check_shape("router_q", router_q, batch=batch, blocks=blocks, heads=heads, head_dim=head_dim)
        check_same_kind("router_q", router_q, q)
    elif routing_block > 1:
        raise ValueError(
            f"router_q is None, expected one query a routing block of {routing_block} tokens: see router_queries"
        )


def check_documents(document_starts: Tensor | None, batch: int, seq: int) -> None:
    """One start for every token of the rows. The values are not read: no host sync."""
    if document_starts is None:
        return
    check_shape("document_starts", document_starts, batch=batch, seq=seq)
    if document_starts.is_floating_point() or document_starts.dtype == torch.bool:
        raise ValueError(f"document_starts has type {document_starts.dtype}, expected an integer type")


def check_positions(q: Tensor, k: Tensor, chunk_size: int, query_starts: tuple[int, ...]) -> None:
    """The pieces of q begin with chunks of the row."""
    seq, piece = k.shape[1], q.shape[1] // len(query_starts)
    for start in query_starts:
        if start < 0 or start % chunk_size or start + piece > seq:
            raise ValueError(
                f"query_starts has {start}: expected a multiple of chunk_size={chunk_size} from 0 to seq - piece = "
                f"{seq} - {piece}, so that the piece's keys are in k"
            )


def check_support(support: Tensor | None, q: Tensor, k: Tensor, chunk_size: int) -> None:
    """A mark for every query, head and chunk of the row."""
    if support is None:
        return
    batch, q_len, heads, _ = q.shape
    check_shape("support", support, batch=batch, heads=heads, q_len=q_len, chunks=-(-k.shape[1] // chunk_size))
    if support.dtype != torch.bool:
        raise ValueError(f"support has type {support.dtype}, expected torch.bool")
