"""Checks of the public functions' arguments. Each error names the argument, what it is and what was expected."""

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
PRIOR_NORMALIZERS = ("geometric_mean", "none", "peak")


def check_shape(name: str, tensor: Tensor, **expected: int) -> None:
    """The tensor's shape is the expected sizes, in order; the keywords name the dimensions in the message."""
    if tuple(tensor.shape) != tuple(expected.values()):
        wanted = ", ".join(f"{dimension}={size}" for dimension, size in expected.items())
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_dimensions(name: str, tensor: Tensor, *dimensions: str) -> None:
    """The tensor is floating point and has these dimensions, none of them empty."""
    if tensor.dim() != len(dimensions) or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{', '.join(dimensions)}], none of them 0")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has type {tensor.dtype}, expected a floating type")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """The value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_same_kind(name: str, tensor: Tensor, q: Tensor) -> None:
    """The tensor has q's type and stands on q's device."""
    if tensor.dtype != q.dtype or tensor.device != q.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected q's {q.dtype} on {q.device}")


def check_group(heads: int, kv_heads: int) -> None:
    """Every KV head serves the same number of query heads."""
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, expected a multiple of k's {kv_heads} kv_heads")


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


def check_router(q: Tensor, router_q: Tensor | None, routing_block: int, query_starts: tuple[int, ...]) -> None:
    """The routers' queries are one a routing block of q."""
    batch, q_len, heads, head_dim = q.shape
    piece = q_len // len(query_starts)
    if len(query_starts) > 1 and piece % routing_block:
        raise ValueError(
            f"query_starts cuts q into pieces of {piece} tokens, expected a multiple of routing_block={routing_block}"
        )
    if router_q is not None:
        blocks = -(-q_len // routing_block)
        check_shape("router_q", router_q, batch=batch, blocks=blocks, heads=heads, head_dim=head_dim)
        check_same_kind("router_q", router_q, q)
    elif routing_block > 1:
        raise ValueError(
            f"router_q is None, expected one query a routing block of {routing_block} tokens: see router_queries"
        )


def check_pieces(q: Tensor, query_starts: tuple[int, ...]) -> None:
    """q is so many equal pieces."""
    if not query_starts or q.shape[1] % len(query_starts):
        raise ValueError(f"query_starts has {len(query_starts)} pieces, expected a divisor of q_len={q.shape[1]}")


def check_documents(document_starts: Tensor | None, batch: int, seq: int) -> None:
    """One start for every token of the rows. The values are not read: no host sync."""
    if document_starts is None:
        return
    check_shape("document_starts", document_starts, batch=batch, seq=seq)
    if document_starts.is_floating_point() or document_starts.dtype == torch.bool:
        raise ValueError(f"document_starts has type {document_starts.dtype}, expected an integer type")


def check_positions(
    q: Tensor,
    k: Tensor,
    chunk_size: int,
    document_starts: Tensor | None,
    query_starts: tuple[int, ...],
    support: Tensor | None,
) -> None:
    """Where queries and documents stand in the row. The values of document_starts are not read: no host sync."""
    batch, q_len, heads, _ = q.shape
    seq = k.shape[1]
    check_pieces(q, query_starts)
    piece = q_len // len(query_starts)
    for start in query_starts:
        if start < 0 or start % chunk_size or start + piece > seq:
            raise ValueError(
                f"query_starts has {start}: expected a multiple of chunk_size={chunk_size} from 0 to seq - piece = "
                f"{seq} - {piece}, so that the piece's keys are in k"
            )
    check_documents(document_starts, batch, seq)
    if support is not None:
        check_shape("support", support, batch=batch, heads=heads, q_len=q_len, chunks=-(-seq // chunk_size))
        if support.dtype != torch.bool:
            raise ValueError(f"support has type {support.dtype}, expected torch.bool")
