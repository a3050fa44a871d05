"""The prior of dash_decode by itself, and what it says of the routed chunks."""

import pytest
import torch

from dash_train.kernels.dash import chunk_summaries, dash_decode, decode_prior

CHUNK, CAPACITY = 16, 150
LENGTHS = torch.tensor([1, 16, 77, 150], dtype=torch.int32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(heads: int = 6, kv_heads: int = 2, head_dim: int = 16):
    q = torch.randn(4, heads, head_dim)
    k, v = torch.randn(2, 4, CAPACITY, kv_heads, head_dim)
    summaries = torch.full((4, -(-CAPACITY // CHUNK), kv_heads, head_dim), torch.nan)
    summaries[:, : CAPACITY // CHUNK] = chunk_summaries(k, torch.randn(kv_heads, head_dim), chunk_size=CHUNK)
    return tuple(t.to(DEVICE) for t in (q, k, v, summaries, LENGTHS))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("prior_normalizer", ["geometric_mean", "none", "peak"])
def test_attention_with_the_prior_is_dash_decode(prior_normalizer: str, backend: str) -> None:
    q, k, v, summaries, lengths = inputs()
    options = {
        "chunk_size": CHUNK,
        "routing_scale": 4.0,
        "prior_normalizer": prior_normalizer,
        "prior_temperature": 1.5,
    }
    prior = decode_prior(q, summaries, lengths, backend=backend, **options)
    assert prior.shape == (4, 2, 10)
    own = (lengths.long() - 1) // CHUNK
    assert (prior[torch.arange(4), :, own] == 0).all()
    bias = prior.repeat_interleave(CHUNK, -1)[..., :CAPACITY]
    bias = bias.masked_fill(torch.arange(CAPACITY, device=DEVICE) >= lengths[:, None, None], -torch.inf)
    logits = torch.einsum("bhgd,bkhd->bhgk", q.unflatten(1, (2, 3)), k) / 4 + bias[:, :, None]
    out = torch.einsum("bhgk,bkhd->bhgd", logits.softmax(-1), v).flatten(1, 2)
    expected = dash_decode(q, k, v, summaries, lengths, backend="reference", **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_active_chunks_are_those_with_a_prior(backend: str) -> None:
    q, k, v, summaries, lengths = inputs()
    options: dict = {"chunk_size": CHUNK, "routing_scale": 4.0, "backend": backend}
    out, active = dash_decode(q, k, v, summaries, lengths, return_active=True, **options)
    assert torch.equal(out, dash_decode(q, k, v, summaries, lengths, **options))
    with_own = decode_prior(q, summaries, lengths, **options).isfinite().sum(-1)
    assert torch.equal(active, with_own.int() - 1)
    assert (active[0] == 0).all() and (active[-1] > 0).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(4, 16)}),
        ("summaries", {"summaries": torch.zeros(4, 10, 2, 8)}),
        ("lengths", {"lengths": torch.ones(3)}),
        ("prior_normalizer", {"prior_normalizer": "mean"}),
    ],
)
def test_decode_prior_names_the_argument(name: str, changes: dict) -> None:
    q, _, _, summaries, lengths = (t.cpu() for t in inputs())
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        decode_prior(**{"q": q, "summaries": summaries, "lengths": lengths, "chunk_size": CHUNK, **changes})
