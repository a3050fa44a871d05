"""Checks of tensors. Each error names the argument, what it is and what was expected."""

from torch import Tensor


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


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    """One query a sequence, its keys and values, and how many of them are written. The values are not read: no host
    sync.
    """
    check_dimensions("q", q, "batch", "heads", "head_dim")
    check_dimensions("k_cache", k_cache, "batch", "capacity", "kv_heads", "head_dim")
    batch, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, batch=batch, capacity=capacity, kv_heads=kv_heads, head_dim=head_dim)
        check_same_kind(name, cache, q)
    check_shape("lengths", lengths, batch=batch)
    check_group(heads, kv_heads)


def check_per_chunk(name: str, tensor: Tensor, k_cache: Tensor, chunk_size: int) -> None:
    """A vector for each chunk and KV head of the cache [batch, capacity, kv_heads, head_dim], as summaries are."""
    batch, capacity, kv_heads, head_dim = k_cache.shape
    chunks = -(-capacity // chunk_size)
    check_shape(name, tensor, batch=batch, chunks=chunks, kv_heads=kv_heads, head_dim=head_dim)
