import math

import pytest
import torch
from vattention_cases import exact_attention, make_inputs

from dash_train.kernels.vattention import make_sketch, vattention_decode
from dash_train.kernels.vattention.reference.importance import (
    Sample,
    Weights,
    chances,
    estimate_from,
    gather,
    read_certain,
    weigh,
)
from dash_train.kernels.vattention.reference.limits import squared_quantile
from dash_train.kernels.vattention.reference.permutation import sample_key
from dash_train.kernels.vattention.reference.proposal import draw, shares, token_words
from dash_train.kernels.vattention.reference.sketch import chunk_bounds, predict_weights, unpack

SMALL = {"epsilon": 0.3, "delta": 0.1, "sink": 20, "window": 20, "base_sample": 24, "chunk_size": 16}


def decode(inputs, **changes):
    """With small chunks and samples."""
    given = inputs._asdict()
    options = {name: given[name] for name in ("summaries", "chunk_bias", "bounds", "seed")}
    options |= {**SMALL, "sampler": "sketch", **changes}
    return vattention_decode(inputs.q, inputs.k, inputs.v, inputs.lengths, **options)


def normal_keys(draws, deviation, context=2048, head_dim=32, heads=2, seed=0):
    """One query and cache, `draws` times; logits of this standard deviation, values with a common mean; the exact
    output and the exact share of the last 64 tokens."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, head_dim, generator=generator)
    q = torch.nn.functional.normalize(q, dim=-1) * deviation * head_dim**0.5
    k = torch.randn(1, context, 1, head_dim, generator=generator)
    v = 1 + torch.randn(1, context, 1, head_dim, generator=generator)
    weights = (q[0] * head_dim**-0.5 @ k[0, :, 0].T).softmax(-1)
    q, k, v = (x.expand(draws, *x.shape[1:]) for x in (q, k, v))
    return q, k, v, torch.full((draws,), context, dtype=torch.int32), weights @ v[0, :, 0], weights[:, -64:].sum(-1)


def last_chunk(v):
    """Values from which the denominator can be read off."""
    v = torch.zeros_like(v)
    v[:, -64:, :, 0] = 1
    return v


@pytest.mark.parametrize("head_dim", [32, 30])
def test_codes_are_places_between_the_bounds(head_dim):
    k = torch.randn(2, 70, 3, head_dim)
    k[:, :, 0, 5] = 2.0  # a channel without a range
    bounds = chunk_bounds(k, 16)
    sketch = make_sketch(k, bounds, 16)
    assert sketch.dtype == torch.uint8 and sketch.shape == (2, 70, 3, 8)
    low, high = (x.repeat_interleave(16, 1)[:, :64] for x in bounds)
    place = (k[:, :64] - low) / (high - low)
    codes = unpack(sketch, head_dim)[:, :64]
    assert torch.equal(codes, (4 * place.nan_to_num(0)).clamp(0, 3).to(torch.uint8))
    assert (codes.flatten().bincount() > 0).all()


def test_predictions_hold_for_keys_that_are_uniform_in_their_cells():
    """Mean and mean square of the weights over many keys with the same codes, and their largest value."""
    torch.manual_seed(0)
    low, high = -torch.rand(1, 1, 1, 8) - 1, torch.rand(1, 1, 1, 8) + 1
    code = torch.randint(1, 3, (8,))  # the inner cells, which are shrunk least
    k = low + (high - low) * (code + torch.rand(1, 64, 1, 8)) / 4
    q = torch.randn(1, 1, 1, 8)
    sketch = make_sketch(k, (low, high), 64)
    assert (unpack(sketch, 8) == code).all()
    seen = predict_weights(q, sketch, (low, high), torch.ones(1, 1, 1, dtype=torch.bool), 64)
    many = low + (high - low) * (code + torch.rand(1, 200_000, 1, 8)) / 4
    logits = (many * q).sum(-1)
    shrink = 0.07 * ((high - low) * (code - 1.5) / 4 * q).sum()  # the sketch's middle is that much nearer to zero
    mean, square = logits.exp().mean().log() - shrink, (2 * logits).exp().mean().log() / 2 - shrink
    assert (seen.mean - mean).abs().max() < 0.01
    assert (seen.root_mean_square - square).abs().max() < 0.01
    assert (logits.max() <= seen.most).all() and (seen.most - logits.max()).max() < 1.5


def test_a_chunk_without_sketch_is_known_by_its_bounds():
    k, q = torch.randn(1, 64, 1, 8), torch.randn(1, 1, 2, 8)
    bounds = chunk_bounds(k, 16)
    sketch = make_sketch(k, bounds, 16)
    sketched = torch.tensor([[[True, False, True, False]]])
    seen = predict_weights(q, sketch, bounds, sketched, 16)
    logits = q[:, :, :, None, :].mul(k.transpose(1, 2)[:, :, None]).sum(-1)
    assert (logits <= seen.most + 1e-5).all()
    for chunk in range(4):
        values = seen.mean[0, 0, 0, 16 * chunk : 16 * (chunk + 1)].unique()
        assert (len(values) == 1) is (chunk % 2 == 1)


def test_tokens_are_drawn_as_often_as_their_probability():
    """Each token over 10^4 seeds, and pairs of tokens independently of each other."""
    seeds, tokens = 10_000, 64
    probability = torch.linspace(0, 1, tokens)
    drawn = draw(token_words(sample_key(torch.arange(seeds), 2), tokens), probability).double()
    variance = probability * (1 - probability)
    assert ((drawn.mean(0) - probability).abs() <= 4.5 * (variance / seeds).sqrt()).all()
    middle = drawn[:, :, 8:-8].flatten(1)
    correlation = torch.corrcoef(middle.T) - torch.eye(middle.shape[1])
    assert correlation.abs().max() < 5.5 / math.sqrt(seeds)


def test_words_can_be_repeated_elsewhere():
    """What a kernel must reproduce to the bit."""
    key = sample_key(torch.tensor([0, 2**40 + 5]), 2)
    words = token_words(key, 3)
    assert words.tolist() == [
        [[2856213345, 0, 1665372330], [3602718825, 4174712994, 1801967902]],
        [[1188409997, 309097146, 1596249227], [362991711, 3338412783, 3180504694]],
    ]
    assert torch.equal(token_words(key, 100)[..., :3], words)


def test_more_is_drawn_from_heavier_tokens_of_any_head():
    residual = torch.ones(1, 1, 100, dtype=torch.bool)
    residual[..., :10] = False
    influence = torch.rand(1, 1, 3, 100) * residual[:, :, None]
    share = shares(influence, residual)
    assert abs(share.sum() - 1) < 1e-5 and (share[..., :10] == 0).all() and (share[..., 10:] >= 0.1 / 90 - 1e-9).all()
    assert torch.equal(share[0, 0].argsort(), influence[0, 0].norm(dim=0).argsort())
    even = shares(torch.zeros_like(influence), residual)
    assert (even[..., 10:] == even[..., 10]).all()


def test_numerator_and_denominator_are_unbiased_at_fixed_probabilities():
    """Over 10^4 seeds each coordinate of N (by Horvitz and Thompson) and D lies within 4.5 standard errors of the
    truth, though the predictions are wrong by a factor of two."""
    torch.manual_seed(1)
    tokens, seeds = 128, 10_000
    logits, v = torch.randn(1, 1, 2, tokens).double(), torch.randn(1, 1, tokens, 4).double()
    certain = (torch.arange(tokens) < 16).expand(1, 1, -1)
    seen = logits + 0.5 * torch.randn_like(logits) + math.log(2)
    weights = Weights(*weigh(logits, type("Seen", (tuple,), {"mean": seen})((seen, seen, seen)), certain, ~certain))
    probability = (40 * shares(weights.influence, ~certain)).clamp(max=1)
    words = token_words(sample_key(torch.arange(seeds), 1), tokens)
    every = [x.expand(seeds, *x.shape[1:]) for x in (*weights, v, probability)]
    sample = gather(draw(words, probability) & ~certain, Weights(*every[:4]), every[4])
    p = chances(sample, every[5])
    read = read_certain(every[0], every[4], certain.expand(seeds, 1, -1))
    slope = torch.full((seeds, 1, 2), 0.7).double()
    mass = estimate_from(sample, p, read, every[1].sum(-1), slope).mass
    numerator = read.values + (sample.weight / p[:, :, None]) @ sample.v
    found = torch.cat([mass[..., None], numerator], -1)
    truth = torch.cat([weights.weight.sum(-1, keepdim=True), weights.weight @ v], -1)
    standard_error = found.std(0) / math.sqrt(seeds)
    assert ((found.mean(0) - truth[0]).abs() < 4.5 * standard_error).all()


def test_adaptive_samples_hardly_bias_the_result():
    """|mean of the output - o| <= epsilon |o| / 20 over 10^4 seeds; likewise the denominator."""
    epsilon = 0.1
    q, k, v, lengths, exact, share = normal_keys(10_000, 1.5, context=384, head_dim=16)
    options = {**SMALL, "epsilon": epsilon, "base_sample": 64, "window": 64, "max_sample": 1.0, "sampler": "sketch"}
    outputs, shares_found = [], []
    for rows in torch.arange(10_000).split(1000):
        out, report = vattention_decode(q[rows], k[rows], v[rows], lengths[rows], seed=rows, **options)
        assert report.density.mean() < 0.9
        outputs.append(out)
        denominator = {"verify": "denominator", **options}
        out, _ = vattention_decode(q[rows], k[rows], last_chunk(v[rows]), lengths[rows], seed=rows, **denominator)
        shares_found.append(share / out[..., 0])
    bias = (torch.cat(outputs).mean(0) - exact).norm(dim=-1)
    assert (bias <= epsilon / 20 * exact.norm(dim=-1)).all()
    assert ((torch.cat(shares_found).mean(0) - 1).abs() <= epsilon / 20).all()


@pytest.mark.parametrize(("verify", "delta"), [("output", 0.1), ("denominator", 0.1), ("denominator", 0.05)])
def test_errors_exceed_epsilon_at_most_delta_of_the_time(verify, delta):
    rates, widths = [], []
    for population in range(2):
        q, k, v, lengths, exact, share = normal_keys(300, 1 + population, context=1536, seed=population)
        options = {**SMALL, "epsilon": 0.1, "delta": delta, "base_sample": 128, "chunk_size": 64, "sampler": "sketch"}
        values = v if verify == "output" else last_chunk(v)
        out, report = vattention_decode(q, k, values, lengths, verify=verify, seed=torch.arange(300), **options)
        assert not report.dense_fallback.any() and report.density.mean() < 0.5
        if verify == "denominator":
            error = (share / out[..., 0] - 1).abs()
        else:
            error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
        rates.append((error > 0.1).float().mean(0))
        widths.append((error > report.half_width).float().mean(0))
    assert (torch.stack(rates) <= delta + 3 * math.sqrt(delta * (1 - delta) / 300)).all()
    assert torch.stack(widths).mean() <= delta


def test_skewed_logits_take_far_fewer_tokens_than_uniform_draws():
    q, k, v, lengths, exact, _ = normal_keys(16, 2.0, context=4096, head_dim=64)
    options = {"epsilon": 0.1, "delta": 0.1, "seed": torch.arange(16)}
    out, report = vattention_decode(q, k, v, lengths, sampler="sketch", **options)
    _, uniform = vattention_decode(q, k, v, lengths, **options)
    assert report.density.mean() < 0.25 and 2 * report.density.mean() < uniform.density.mean()
    assert ((out - exact).norm(dim=-1) < 0.1 * exact.norm(dim=-1)).float().mean() > 0.8
    assert uniform.sketch_bytes is None
    assert (report.sketch_bytes == (4096 - 256) * 64 // 4).all()


def test_a_needle_that_only_the_sketch_shows_is_found():
    """It holds a fifth of the softmax; neither its chunk's mean nor the page bounds stand out."""
    q, k, v, lengths, _, _ = normal_keys(64, 1.0, heads=1, head_dim=64)
    k, v = k.clone(), v.clone()
    logits = q[0, 0] / 8 @ k[0, :, 0].T
    k[:, 1000, 0] = (logits.logsumexp(0) + math.log(0.25)) * 8 * q[0, 0] / q[0, 0].square().sum()
    v[:, 1000, 0] = 10
    exact = (q[0] / 8 @ k[0, :, 0].T).softmax(-1) @ v[0, :, 0]
    options = {"epsilon": 0.1, "delta": 0.1, "base_sample": 128, "seed": torch.arange(64)}
    out, _ = vattention_decode(q, k, v, lengths, sampler="sketch", **options)
    assert ((out - exact).norm(dim=-1) > 0.1 * exact.norm(dim=-1)).float().mean() <= 0.2
    missed, _ = vattention_decode(q, k, v, lengths, heavy=0.0, **options)
    assert ((missed - exact).norm(dim=-1) > 0.1 * exact.norm(dim=-1)).float().mean() > 0.5


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("how", ["max_sample", "epsilon"])
def test_reading_everything_equals_exact_attention(prior, how):
    inputs = make_inputs(prior=prior)
    inputs = inputs._replace(q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double())
    changes = {"max_sample": {"max_sample": 0.0}, "epsilon": {"epsilon": 1e-9, "max_sample": 1.0}}[how]
    out, report = decode(inputs, **changes)
    torch.testing.assert_close(out, exact_attention(inputs), rtol=1e-12, atol=1e-12)
    assert (report.density == 1).all() and (report.half_width == 0).all() and not report.unbounded_chunks.any()
    assert report.dense_fallback.all() or how == "epsilon"


@pytest.mark.parametrize("verify", ["output", "denominator"])
def test_rows_do_not_depend_on_the_batch(verify):
    inputs = make_inputs(lengths=(700, 333, 40), prior=True)
    out, report = decode(inputs, verify=verify)
    for row in range(3):
        alone, alone_report = decode(
            type(inputs)(*(x[row : row + 1] if x is not None else None for x in inputs)), verify=verify
        )
        torch.testing.assert_close(alone[0], out[row], rtol=1e-5, atol=1e-6)
        assert torch.equal(alone_report.tokens_read[0], report.tokens_read[row])
        assert torch.equal(alone_report.sketch_bytes[0], report.sketch_bytes[row])


def test_seeds():
    inputs = make_inputs()
    out, _ = decode(inputs, seed=7)
    assert torch.equal(out, decode(inputs, seed=7)[0])
    assert torch.equal(out, decode(inputs, seed=torch.tensor([7, 7]))[0])
    other, _ = decode(inputs, seed=torch.tensor([7, 7 + 2**33]))
    assert torch.equal(out[0], other[0]) and not torch.equal(out[1], other[1])


def test_a_given_sketch_is_that_of_the_call():
    inputs = make_inputs()
    bounds = chunk_bounds(inputs.k, 16)
    sketch = make_sketch(inputs.k, bounds, 16)
    assert torch.equal(decode(inputs, bounds=bounds, sketch=sketch)[0], decode(inputs)[0])
    wrong, _ = decode(inputs, bounds=bounds, sketch=255 - sketch, max_sample=1.0)  # the sample grows, no more
    exact = exact_attention(inputs)
    assert ((wrong - exact).norm(dim=-1) < 0.3 * exact.norm(dim=-1)).float().mean() > 0.8


def test_bounds_drop_what_cannot_matter_and_spare_its_sketch():
    inputs = make_inputs(lengths=(700, 700), bounds=True)
    out, report = decode(inputs)
    exact = exact_attention(inputs)
    assert ((out - exact).norm(dim=-1) < 0.3 * exact.norm(dim=-1)).all()
    assert (report.sketch_bytes < 0.9 * 700 * 8).all()


def test_bfloat16():
    inputs = make_inputs()
    low = inputs._replace(q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    out, _ = decode(low)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_the_quantile_falls_from_one_direction_to_many():
    torch.manual_seed(0)
    p = torch.full((1, 1, 4000), 0.1)
    for rank, expected in ((1, 1.645**2), (64, 1.23)):
        errors = torch.zeros(1, 1, 1, 4000, 64)
        errors[..., :rank] = torch.randn(1, 1, 1, 4000, rank)
        assert abs(squared_quantile(errors, p, 0.1).item() / expected - 1) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "stratified"}, "^sampler is .*expected"),
        ({"backend": "triton"}, "^backend='triton' of vattention_decode has no sampler='sketch'"),
        ({"sampler": "uniform", "sketch": torch.zeros(2, 700, 2, 8, dtype=torch.uint8)}, "^sketch is .*expected"),
        ({"sketch": torch.zeros(2, 700, 2, 8, dtype=torch.uint8)}, "^sketch is given without bounds, expected"),
        ({"sketch": torch.zeros(2, 700, 2, 8)}, "^sketch is torch.float32, expected"),
        ({"sketch": torch.zeros(2, 700, 2, 16, dtype=torch.uint8)}, r"^sketch has shape .*expected .*bytes=8"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        decode(make_inputs(), **changes)


def test_padding_of_a_sample_counts_for_nothing():
    drawn = torch.tensor([[[True, False, True, True]], [[False, False, False, True]]])
    weight = torch.rand(2, 1, 1, 4)
    sample = gather(drawn, Weights(weight, weight, weight, weight), torch.randn(2, 1, 4, 3))
    assert isinstance(sample, Sample) and sample.place[0, 0].tolist() == [0, 2, 3]
    assert sample.weight[1, 0, 0].tolist() == [weight[1, 0, 0, 3], 0, 0]
    assert chances(sample, torch.full((2, 1, 4), 0.5)).tolist() == [[[0.5, 0.5, 0.5]], [[0.5, 1, 1]]]
