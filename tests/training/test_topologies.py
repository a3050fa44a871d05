"""A run goes on with other ranks, ZeRO stage, context, offload, precision or accumulation as if nothing had changed."""

import itertools

import pytest
from reshaped_runs import lines, run_leg
from tiny_runs import write_recipe

OPTIONS = {
    "train__steps": 8,
    "train__validate_every": 0,
    "checkpoint__every": 100,
    "checkpoint__keep_last": 1,
    "train__seq": 256,
    "optimizer__grad_clip": 0.3,
    "optimizer__weight_decay": 0.5,
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
}
FIXED = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 64}
FIXED |= {"tie_embeddings": True, "attention": {"chunk_size": 16, "routing_scale": 50.0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """Losses and counts of a run on one rank that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    run_leg(write_recipe(folder / "recipe.yaml", corpus, model=FIXED, **OPTIONS), 1, [])
    return lines(folder / "run")


@pytest.fixture
def reshaped(tmp_path, corpus):
    """Runs legs of two steps, each (ranks, overrides); returns losses and counts of all."""

    def run(*legs):
        recipe = write_recipe(tmp_path / "recipe.yaml", corpus, model=FIXED, **OPTIONS)
        for number, (ranks, *overrides) in enumerate(legs, start=1):
            run_leg(recipe, ranks, [f"train.steps={2 * number}", "schedule.steps=8", *overrides])
        return lines(tmp_path / "run")

    return run


STAGE = "parallel.zero_stage={}".format
OFFLOADED = "parallel.offload_optimizer=cpu"
CHUNKED = ["train.micro_batch_size=1", "train.activation_checkpointing=full"]


@pytest.mark.parametrize(
    "legs",
    [
        [(1, STAGE(1)), (1, STAGE(2), OFFLOADED), (1, STAGE(3), *CHUNKED), (1, STAGE(0))],
        [(2, STAGE(1)), (1, STAGE(3)), (2, STAGE(2)), (1, STAGE(0))],
        [(2, STAGE(3)), (2, STAGE(3), "parallel.context=2"), (1, STAGE(3), OFFLOADED), (2, STAGE(0))],
    ],
    ids=["stages", "ranks", "context"],
)
def test_another_topology_changes_no_loss(whole, reshaped, legs):
    losses, counts = reshaped(*legs)
    assert losses == pytest.approx(whole[0], abs=1e-4)
    assert counts == whole[1]


def test_precision_may_change(whole, reshaped):
    """bf16 keeps fp32 masters and moments: what comes after is off by the rounding of the steps taken in it."""
    losses, counts = reshaped((1, STAGE(1)), (1, STAGE(1), "train.precision=bf16"), (1, STAGE(3)), (1, STAGE(2)))
    assert losses == pytest.approx(whole[0], abs=5e-3)
    assert losses[:2] == whole[0][:2]
    assert counts == whole[1]


PRODUCT = [(ranks, STAGE(stage), *more) for ranks in (1, 2, 4) for stage in range(4) for more in ((), CHUNKED)]
PRODUCT += [(ranks, STAGE(stage), "parallel.context=2") for ranks in (2, 4) for stage in range(4)]
PRODUCT += [(ranks, STAGE(stage), OFFLOADED) for ranks in (1, 2) for stage in (1, 2, 3)]


@pytest.mark.product
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", PRODUCT, ids=lambda leg: " ".join(map(str, leg)))
def test_every_topology_goes_on_from_every_other(whole, reshaped, first):
    """Three others each, drawn so that every pair of kinds meets."""
    place = PRODUCT.index(first)
    others = list(itertools.islice(itertools.cycle(PRODUCT), place + 7, place + 28, 7))
    losses, counts = reshaped(first, *others)
    assert losses == pytest.approx(whole[0], abs=1e-4)
    assert counts == whole[1]
