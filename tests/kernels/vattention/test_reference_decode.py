import math

import pytest
import torch
from vattention_cases import exact_attention, make_config, make_inputs

from dash_train.kernels.vattention import baselines, vattention_decode
from dash_train.kernels.vattention.reference.attention import attend, draw_order, vattention_reference
from dash_train.kernels.vattention.reference.permutation import permute, sample_key
from dash_train.kernels.vattention.reference.population import Population, split_population

SMALL = {"epsilon": 0.3, "delta": 0.1, "sink": 20, "window": 20, "heavy": 0.1, "base_sample": 24, "chunk_size": 16}


def decode(inputs, **changes):
    """With the options of make_config."""
    given = inputs._asdict()
    options = {name: given[name] for name in ("summaries", "chunk_bias", "bounds", "seed")}
    return vattention_decode(inputs.q, inputs.k, inputs.v, inputs.lengths, **{**options, **SMALL, **changes})


def many_draws(draws, context=256, head_dim=8, seed=0):
    """The same query and cache `draws` times, each with a seed of its own; values have a common mean."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, head_dim, generator=generator).expand(draws, -1, -1)
    k = torch.randn(1, context, 1, head_dim, generator=generator).expand(draws, -1, -1, -1)
    v = 1 + torch.randn(1, context, 1, head_dim, generator=generator).expand(draws, -1, -1, -1)
    exact = (q[0] * head_dim**-0.5 @ k[0, :, 0].T).softmax(-1) @ v[0, :, 0]
    return q, k, v, torch.full((draws,), context, dtype=torch.int32), exact


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permutation_is_one(size):
    keys = sample_key(torch.tensor([0, 5, -3, 2**40 + 17]), 3)
    places = permute(torch.arange(size), torch.tensor(size), keys[..., None])
    assert (places.sort(-1).values == torch.arange(size)).all()
    assert len(keys.unique()) == 12


@pytest.mark.parametrize("population", ["noise", "trend", "blocks", "odd"])
def test_samples_vary_as_samples_without_replacement_do(population):
    """Mean and variance of the sample mean over 4,000 seeds, also where neighbours are alike."""
    size, b, seeds = 1024, 100, 4000
    values = {
        "noise": torch.randn(size),
        "trend": torch.arange(size).float(),
        "blocks": torch.randn(size // 64).repeat_interleave(64),
        "odd": torch.arange(size).float() % 2,
    }[population].double()
    sample = permute(torch.arange(b), torch.tensor(size), sample_key(torch.arange(seeds), 1))
    means = values[sample].mean(-1)
    variance = values.var() / b * (1 - b / size)
    assert abs(means.mean() - values.mean()) < 4 * (variance / seeds).sqrt()
    assert abs(means.var() / variance - 1) < 4 * math.sqrt(2 / seeds)


def test_numerator_and_denominator_are_unbiased_at_a_fixed_budget():
    """Over 10^4 seeds each coordinate of N and D lies within 4.5 standard errors of the truth."""
    torch.manual_seed(1)
    context, b, seeds = 128, 32, 10_000
    logits, v = torch.randn(1, 1, 2, context).double(), torch.randn(1, 1, context, 4).double()
    certain = (torch.arange(context) < 16).expand(seeds, 1, -1)
    draw = draw_order(~certain, sample_key(torch.arange(seeds), 1))
    n_s = torch.full((seeds, 1), context - 16)
    out, log_mass = attend(logits.expand(seeds, -1, -1, -1), v, certain, draw < b, n_s, torch.full_like(n_s, b))
    mass = log_mass.exp()
    estimates = torch.cat([mass[..., None], out * mass[..., None]], -1)
    truth = torch.cat([logits.exp().sum(-1, keepdim=True), logits.exp() @ v], -1)
    standard_error = estimates.std(0) / math.sqrt(seeds)
    assert ((estimates.mean(0) - truth[0]).abs() < 4.5 * standard_error).all()


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_adaptive_budgets_hardly_bias_the_output(epsilon):
    """|mean of the output - o| <= epsilon |o| / 20 over 10^4 seeds."""
    q, k, v, lengths, exact = many_draws(10_000)
    options = {**SMALL, "epsilon": epsilon, "base_sample": 48, "max_sample": 1.0}
    out, report = vattention_decode(q, k, v, lengths, seed=torch.arange(10_000), **options)
    assert report.density.mean() < 0.8
    assert ((out.mean(0) - exact).norm(dim=-1) <= epsilon / 20 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize(("verify", "delta"), [("output", 0.1), ("denominator", 0.1), ("denominator", 0.05)])
def test_errors_exceed_epsilon_at_most_delta_of_the_time(verify, delta):
    """Output or denominator, which is read off a value that the last token alone has; some are near the limit."""
    rates = []
    for population in range(4):
        q, k, v, lengths, exact = many_draws(1000, context=2048, seed=population)
        if verify == "denominator":
            v = torch.zeros_like(v)
            v[:, -1] = 1
            exact = (q[0] * 8**-0.5 @ k[0, :, 0].T).softmax(-1) @ v[0, :, 0]
        options = {**SMALL, "epsilon": 0.1, "delta": delta, "base_sample": 256}
        out, report = vattention_decode(q, k, v, lengths, verify=verify, seed=torch.arange(1000), **options)
        assert not report.dense_fallback.any()
        if verify == "denominator":
            error = (exact[:, 0] / out[..., 0] - 1).abs()
        else:
            error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
        rates.append((error > 0.1).float().mean(0))
    rates = torch.stack(rates)
    assert (rates <= delta + 3 * math.sqrt(delta * (1 - delta) / 1000)).all()
    assert verify == "output" or rates.max() > delta / 10  # the budget is no waste


def test_half_width_is_the_error_that_is_exceeded_delta_of_the_time():
    q, k, v, lengths, _ = many_draws(1000, context=2048)
    v = torch.zeros_like(v)
    v[:, -1] = 1
    exact = (q[0] * 8**-0.5 @ k[0, :, 0].T).softmax(-1) @ v[0, :, 0]
    options = {**SMALL, "epsilon": 0.1, "delta": 0.1, "base_sample": 256, "verify": "denominator"}
    out, report = vattention_decode(q, k, v, lengths, seed=torch.arange(1000), **options)
    rate = ((exact[:, 0] / out[..., 0] - 1).abs() > report.half_width).float().mean()
    assert 0.05 < rate < 0.16


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("how", ["max_sample", "epsilon", "base_sample"])
def test_reading_everything_equals_exact_attention(prior, how):
    inputs = make_inputs(prior=prior)
    inputs = inputs._replace(q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double())
    changes = {
        "max_sample": {"max_sample": 0.0},
        "epsilon": {"epsilon": 1e-6, "max_sample": 1.0},
        "base_sample": {"base_sample": 700, "max_sample": 1.0},
    }[how]
    out, report = decode(inputs, **changes)
    torch.testing.assert_close(out, exact_attention(inputs), rtol=1e-12, atol=1e-12)
    assert (report.density == 1).all() and (report.half_width == 0).all()
    assert report.dense_fallback.all() or how == "epsilon"


def test_fallback_is_reported():
    """Values that cancel demand more than half of the tokens."""
    inputs = make_inputs()
    _, report = decode(inputs._replace(v=inputs.v - 1), epsilon=0.05)
    assert report.dense_fallback.all() and (report.half_width == 0).all()
    assert report.tokens_read.tolist() == [[700, 700], [333, 333]]
    _, sampled = decode(inputs, epsilon=0.6)
    assert not sampled.dense_fallback.any() and (sampled.half_width > 0).all() and (sampled.density < 0.5).all()


def test_value_floor_bounds_the_budget_of_cancelling_values():
    inputs = make_inputs()
    _, report = decode(inputs._replace(v=inputs.v - 1), epsilon=0.3, value_floor=1.0)
    assert not report.dense_fallback.any()


def test_rows_do_not_depend_on_the_batch():
    inputs = make_inputs(lengths=(700, 333, 40), prior=True)
    out, report = decode(inputs)
    for row in range(3):
        alone, alone_report = decode(type(inputs)(*(x[row : row + 1] if x is not None else None for x in inputs)))
        torch.testing.assert_close(alone[0], out[row], rtol=1e-5, atol=1e-6)
        assert torch.equal(alone_report.tokens_read[0], report.tokens_read[row])


def test_seeds():
    inputs = make_inputs()
    out, _ = decode(inputs, seed=7)
    assert torch.equal(out, decode(inputs, seed=7)[0])
    assert torch.equal(out, decode(inputs, seed=torch.tensor([7, 7]))[0])
    other, _ = decode(inputs, seed=torch.tensor([7, 7 + 2**33]))
    assert torch.equal(out[0], other[0]) and not torch.equal(out[1], other[1])


def test_population_of_a_full_attention_model():
    """700 tokens are 44 chunks: two at each end are near, four are heavy, here those of the best mean keys."""
    inputs = make_inputs(lengths=(700,))
    population = split_population(*inputs[:1], *inputs[4:5], inputs.lengths, None, None, make_config())
    certain, residual, dropped = population[:3]
    assert (certain.sum(-1) == 8).all() and (residual == ~certain).all() and not dropped.any()
    assert certain[..., [0, 1, 42, 43]].all()
    scores = inputs.q.unflatten(1, (2, 2)) @ inputs.summaries.permute(0, 2, 3, 1) * 32**-0.5
    shares = scores[..., :43].softmax(-1).amax(2)[..., 2:42]
    assert torch.equal(certain[..., 2:42], shares >= shares.topk(4, -1).values[..., -1:])


def test_population_of_a_dash_model_is_the_routed_chunks():
    inputs = make_inputs(prior=True)
    population = split_population(inputs.q, inputs.summaries, inputs.lengths, inputs.chunk_bias, None, make_config())
    exists = torch.arange(44) * 16 < inputs.lengths[:, None, None]
    assert torch.equal(population.certain | population.residual, exists & (inputs.chunk_bias > -torch.inf))
    _, report = decode(inputs, max_sample=0.0)
    tokens = (inputs.lengths[:, None, None] - torch.arange(44) * 16).clamp(0, 16)
    expected = (tokens * (inputs.chunk_bias > -torch.inf)).sum(-1)
    assert torch.equal(report.tokens_read, expected.int())


def test_page_bounds_find_needles_and_drop_what_cannot_matter():
    inputs = make_inputs(lengths=(700, 700), bounds=True)
    population = split_population(inputs.q, inputs.summaries, inputs.lengths, None, inputs.bounds, make_config())
    needles = torch.arange(7, 700, 150) // 16
    assert population.certain[..., needles].all()
    assert population.dropped[..., 11:15].all() and not population.unbounded.any()
    out, report = decode(inputs)
    assert not report.dense_fallback.any() and not report.unbounded_chunks.any()
    exact = exact_attention(inputs)
    assert ((out - exact).norm(dim=-1) < 0.3 * exact.norm(dim=-1)).all()


def test_bounds_that_prove_nothing_rank():
    """Twice as many chunks as without bounds are certain, and the report says how many could hide a needle."""
    inputs = make_inputs(lengths=(700,))
    keys = inputs.k[:, :688].unflatten(1, (43, 16))
    pad = (0, 0, 0, 0, 0, 1)
    bounds = tuple(torch.nn.functional.pad(x, pad) for x in (keys.amin(2) - 9, keys.amax(2) + 9))
    population = split_population(inputs.q, inputs.summaries, inputs.lengths, None, bounds, make_config())
    assert (population.certain.sum(-1) == 12).all()
    assert (population.unbounded == 32).all() and not population.least_sample.any()


def test_summaries_default_to_mean_keys():
    inputs = make_inputs()
    assert torch.equal(decode(inputs)[0], decode(inputs, summaries=None)[0])


def test_without_window_the_incomplete_chunk_is_sampled():
    inputs = make_inputs()
    out, report = decode(inputs, window=0, sink=0, heavy=0.0, epsilon=0.9)
    assert report.tokens_read.tolist() == [[24, 24], [24, 24]]
    assert out.isfinite().all()


def test_a_given_budget_is_what_is_read():
    inputs = make_inputs()
    config = make_config()
    population = split_population(inputs.q, inputs.summaries, inputs.lengths, None, None, config)
    assert isinstance(population, Population)
    budget = torch.tensor([[30, 60], [40, 50]])
    arguments = (inputs.q, inputs.k, inputs.v, inputs.lengths, None, inputs.seed, population, config)
    _, report = vattention_reference(*arguments, budget=budget)
    certain = (population.certain * (inputs.lengths[:, None, None] - torch.arange(44) * 16).clamp(0, 16)).sum(-1)
    assert torch.equal(report.tokens_read, (certain + budget).int())


def test_bfloat16():
    inputs = make_inputs()
    low = inputs._replace(q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    out, _ = decode(low, max_sample=0.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact_attention(inputs), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("method", ["full", "oracle_top_k", "oracle_top_p", "uniform_sample", "summary_top_k"])
def test_baselines(method):
    inputs = make_inputs(lengths=(700, 333))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.lengths)
    options = {} if method == "full" else {"sink": 20, "window": 20}
    out, report = getattr(baselines, method)(*arguments, **options)
    exact = exact_attention(inputs)
    error = ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
    assert error < 1e-5 if method == "full" else 1e-5 < error < 0.6
    assert method != "uniform_sample" or report.tokens_read.tolist() == [[70, 70], [41, 41]]
    everything = {"full": {}, "oracle_top_p": {"mass": 1.1}}.get(method, {"share": 1.0})
    out, report = getattr(baselines, method)(*arguments, **options, **everything)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert report.tokens_read.tolist() == [[700, 700], [333, 333]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(2, 1, 4, 32)}),
        ("q", {"q": torch.zeros(2, 3, 32)}),
        ("k_cache", {"k": torch.zeros(1, 700, 2, 32)}),
        ("v_cache", {"v": torch.zeros(2, 700, 2, 16)}),
        ("lengths", {"lengths": torch.ones(3)}),
        ("summaries", {"summaries": torch.zeros(2, 43, 2, 32)}),
        ("chunk_bias", {"chunk_bias": torch.zeros(2, 2, 43)}),
        (r"bounds\[1\]", {"bounds": (torch.zeros(2, 44, 2, 32), torch.zeros(2, 44, 2, 8))}),
        ("seed", {"seed": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_errors_name_the_tensor(name, changes):
    with pytest.raises(ValueError, match=rf"^{name} .*expected"):
        decode(make_inputs()._replace(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.0),
        ("delta", 1.0),
        ("heavy", 1.5),
        ("max_sample", -0.1),
        ("base_sample", 1),
        ("sink", -1),
        ("verify", "both"),
        ("backend", "cuda"),
    ],
)
def test_errors_name_the_number(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*expected"):
        decode(make_inputs(), **{name: value})
