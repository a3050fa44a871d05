"""Decoding with full attention, whose Triton kernel is dash_decode's over the list of all chunks."""

import pytest
import torch

from dash_train.kernels.full import full_decode, list_all_chunks

CAPACITY = 150
LENGTHS = torch.tensor([1, 16, 77, 150], dtype=torch.int32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(heads: int = 6, kv_heads: int = 2, head_dim: int = 16):
    q = torch.randn(4, heads, head_dim)
    k, v = torch.randn(2, 4, CAPACITY, kv_heads, head_dim)
    return tuple(t.to(DEVICE) for t in (q, k, v, LENGTHS))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (16, 1)])
def test_full_decode_is_softmax_attention_to_what_is_written(heads: int, kv_heads: int, backend: str) -> None:
    q, k, v, lengths = inputs(heads, kv_heads)
    for row, length in enumerate(LENGTHS.tolist()):
        k[row, length:], v[row, length:] = 1e4, 1e4  # a cache's rest means nothing, but is finite
    out = full_decode(q, k, v, lengths, backend=backend)
    lists = list_all_chunks(lengths, CAPACITY, kv_heads)
    assert torch.equal(full_decode(q, k, v, lengths, lists=lists, backend=backend), out)
    for row, length in enumerate(LENGTHS.tolist()):
        logits = torch.einsum("hgd,khd->hgk", q[row].unflatten(0, (kv_heads, -1)), k[row, :length]) / 4
        expected = torch.einsum("hgk,khd->hgd", logits.softmax(-1), v[row, :length]).flatten(0, 1)
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(4, 5, 16)}),
        ("k_cache", {"k_cache": torch.zeros(4, CAPACITY, 2, 8)}),
        ("v_cache", {"v_cache": torch.zeros(4, CAPACITY, 2, 16).double()}),
        ("lengths", {"lengths": torch.ones(3)}),
        ("lists", {"lists": list_all_chunks(LENGTHS, CAPACITY + 64, 2)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_full_decode_names_the_argument(name: str, changes: dict) -> None:
    q, k, v, lengths = (t.cpu() for t in inputs())
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        full_decode(**{"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, **changes})
