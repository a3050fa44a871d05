import pytest
import torch

from dash_train.kernels.dash import chunk_summaries, dash_attention, dash_decode, update_summaries

CHUNK, CAPACITY = 8, 52  # the cache ends within a chunk


def inputs(heads=4, kv_heads=2, head_dim=16):
    """q, k, v over a whole cache, and a chunk query."""
    q = torch.randn(3, CAPACITY, heads, head_dim)
    k, v = torch.randn(2, 3, CAPACITY, kv_heads, head_dim)
    return q, k, v, torch.randn(kv_heads, head_dim)


def empty_cache(kv_heads=2, head_dim=16):
    """Keys, values and summaries of a cache not written to: reading them would show."""
    k, v = torch.full((2, 3, CAPACITY, kv_heads, head_dim), torch.nan)
    return k, v, torch.full((3, 7, kv_heads, head_dim), torch.nan)


@pytest.mark.parametrize("prior_normalizer", ["geometric_mean", "none", "peak"])
@pytest.mark.parametrize("heads", [2, 6])
def test_every_step_equals_the_last_row_of_dash_attention(prior_normalizer, heads):
    q, k, v, w = inputs(heads=heads)
    options = {
        "chunk_size": CHUNK,
        "routing_scale": 4.0,
        "prior_normalizer": prior_normalizer,
        "prior_temperature": 1.5,
    }
    expected = dash_attention(q, k, v, w, **options)  # causal: row t is the last row of the first t + 1 tokens
    k_cache, v_cache, summaries = empty_cache()
    for t in range(CAPACITY):
        k_cache[:, t], v_cache[:, t] = k[:, t], v[:, t]
        lengths = torch.full((3,), t + 1, dtype=torch.int32)
        update_summaries(k_cache, summaries, lengths, w, chunk_size=CHUNK)
        out = dash_decode(q[:, t], k_cache, v_cache, summaries, lengths, **options)
        torch.testing.assert_close(out, expected[:, t], rtol=1e-4, atol=1e-5)


def test_sequences_of_different_lengths():
    q, k, v, w = inputs()
    lengths = torch.tensor([1, 16, 45], dtype=torch.int32)
    k_cache, v_cache, summaries = empty_cache()
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, :length], v_cache[b, :length] = k[b, :length], v[b, :length]
        complete = length // CHUNK
        summaries[b, :complete] = chunk_summaries(k[b : b + 1, :length], w, chunk_size=CHUNK)[0]
    newest = q[torch.arange(3), lengths.long() - 1]
    out = dash_decode(newest, k_cache, v_cache, summaries, lengths, chunk_size=CHUNK, routing_scale=4.0)
    expected = dash_attention(q, k, v, w, chunk_size=CHUNK, routing_scale=4.0)[torch.arange(3), lengths.long() - 1]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_update_writes_completed_chunks_only():
    _, k, _, w = inputs()
    _, _, summaries = empty_cache()
    update_summaries(k, summaries, torch.tensor([8, 9, 48]), w, chunk_size=CHUNK)
    written = ~summaries.isnan().any(-1).any(-1)
    assert written.nonzero().tolist() == [[0, 0], [2, 5]]
    expected = chunk_summaries(k, w, chunk_size=CHUNK)
    torch.testing.assert_close(summaries[0, 0], expected[0, 0])
    torch.testing.assert_close(summaries[2, 5], expected[2, 5])


def test_summary_is_the_softmax_weighted_mean_of_the_keys():
    _, k, _, w = inputs()
    summary = chunk_summaries(k, w, chunk_size=CHUNK)
    assert summary.shape == (3, CAPACITY // CHUNK, 2, 16)
    keys = k[1, 16:24, 1]
    torch.testing.assert_close(summary[1, 2, 1], (keys @ w[1] / 4).softmax(0) @ keys)
    torch.testing.assert_close(chunk_summaries(k, torch.zeros_like(w), chunk_size=CHUNK)[1, 2, 1], keys.mean(0))


def test_bfloat16():
    q, k, v, w = (t.bfloat16() for t in inputs())
    lengths = torch.full((3,), 40, dtype=torch.int32)
    summaries = torch.zeros(3, 7, 2, 16)
    summaries[:, :6] = chunk_summaries(k, w, chunk_size=CHUNK)
    out = dash_decode(q[:, 39], k, v, summaries, lengths, chunk_size=CHUNK)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dash_attention(q, k, v, w, chunk_size=CHUNK)[:, 39], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(3, 1, 4, 16)}),
        ("q", {"q": torch.zeros(3, 3, 16)}),
        ("k_cache", {"k_cache": torch.zeros(2, CAPACITY, 2, 16)}),
        ("v_cache", {"v_cache": torch.zeros(3, CAPACITY, 2, 8)}),
        ("v_cache", {"v_cache": torch.zeros(3, CAPACITY, 2, 16).double()}),
        ("summaries", {"summaries": torch.zeros(3, 6, 2, 16)}),
        ("lengths", {"lengths": torch.ones(3, 1)}),
        ("prior_normalizer", {"prior_normalizer": "mean"}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_errors_name_the_argument(name, changes):
    q, k, v, _ = inputs()
    arguments = {"q": q[:, 0], "k_cache": k, "v_cache": v, "summaries": torch.zeros(3, 7, 2, 16)}
    arguments |= {"lengths": torch.ones(3, dtype=torch.int32), "chunk_size": CHUNK}
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        dash_decode(**{**arguments, **changes})


def test_update_errors_name_the_argument():
    _, k, _, w = inputs()
    with pytest.raises(ValueError, match=r"^summaries has shape .*expected"):
        update_summaries(k, torch.zeros(3, 7, 2, 8), torch.ones(3), w, chunk_size=CHUNK)
    with pytest.raises(ValueError, match=r"^chunk_query has shape .*expected"):
        update_summaries(k, torch.zeros(3, 7, 2, 16), torch.ones(3), w[:1], chunk_size=CHUNK)


@pytest.mark.gpu
def test_the_host_never_waits_while_summaries_are_updated():
    _, k, _, w = (t.cuda() for t in inputs())
    summaries = torch.zeros(3, 7, 2, 16, device="cuda")
    lengths = torch.tensor([8, 9, 48], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_summaries(k, summaries, lengths, w, chunk_size=CHUNK)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(summaries[2, 5], chunk_summaries(k, w, chunk_size=CHUNK)[2, 5])
