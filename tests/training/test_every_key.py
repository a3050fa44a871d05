"""Every key of the recipe, changed on a resume, takes effect or is refused by its name.

A new key of the schema has no line in the table below, and fails the test until someone has thought about it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_recipe

from dash_train.data.errors import DataError
from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe, recipe_keys
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer, train


@dataclass
class Moves:
    """`look(trainer)` gives something else than without the change; `too` are changes that the key needs beside it, in
    both runs."""

    look: Any
    value: Any
    too: tuple[str, ...] = ()


@dataclass
class Refused:
    value: Any
    names: str = ""
    """What the message names, where it is not the key."""
    too: tuple[str, ...] = ()


@dataclass
class Elsewhere:
    """Needs more than this test has: several ranks, an accelerator, a package."""

    test: str


def steps(trainer):
    """Losses, rates, norms and weights of the steps that follow."""
    trainer.train()
    files = {name: tensor.sum().item() for name, tensor in checkpoint.load_weights(trainer.run_dir).items()}
    training, _ = read_metrics(trainer.run_dir)
    return [(line["loss"], line["lr"], line["grad_norm"]) for line in training[2:]], files


def validation(trainer):
    trainer.train()
    return [(line["step"], line["validation_loss"]) for line in read_metrics(trainer.run_dir)[1]]


def logged(trainer):
    trainer.train()
    return [sorted(json.loads(line)) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


def saved(trainer):
    trainer.train()
    return sorted(path.name for path in (trainer.run_dir / "checkpoints").glob("step-*"))


def written(trainer):
    trainer.train()
    return sorted(path.name for path in trainer.run_dir.iterdir())


def kept(trainer):
    """What a checkpoint holds of a parameter."""
    trainer.train()
    return json.loads((checkpoint.find(trainer.run_dir) / "index.json").read_text())["parameters"]["model.norm.weight"][
        "kinds"
    ]


def copied(trainer):
    trainer.train()
    address = trainer.recipe.checkpoint.copy_to
    return address and sorted(path.name for path in Path(address).rglob("step-*"))


def engine(trainer):
    return trainer.deepspeed_config


def rows(trainer):
    return str(trainer.data_folder), trainer.validation.rows.shards.digest()


def config(trainer):
    """For what the code reads where it is used: there is no copy of it."""
    return trainer.recipe.model_dump()


def scales(trainer):
    return checkpoint.load_model_config(checkpoint.find(trainer.run_dir)).attention.routing_scale


LONG = {"type": "longrope", "factor": 2.0, "original_seq": 64, "short_factor": [2.0] * 8, "long_factor": [2.0] * 8}
YARN = {"type": "yarn", "factor": 2.0, "original_seq": 1024}
LLAMA = {"type": "llama3", "factor": 2.0, "original_seq": 64}
WSD = ("schedule.type=wsd",)
TABLE: dict[str, Any] = {
    "run_dir": Elsewhere("another folder is another run"),
    "init.from": Refused("{run}"),
    "init.keep": Elsewhere("test_stages.py"),
    **{
        f"model.{key}": Refused(value)
        for key, value in {
            "layers": 3,
            "hidden_size": 64,
            "heads": 2,
            "kv_heads": 4,
            "head_dim": 32,
            "mlp_size": 32,
            "vocab_size": 1024,
            "tie_embeddings": False,
            "qk_norm": True,
            "qkv_bias": True,
            "init_std": 0.1,
        }.items()
    },
    "model.norm_eps": Moves(steps, 1e-2),
    "model.rope_theta": Moves(steps, 100.0),
    "model.rope_scaling.type": Moves(steps, YARN),
    "model.rope_scaling.factor": Moves(steps, {**YARN, "factor": 8.0}, too=(f"model.rope_scaling={YARN}",)),
    "model.rope_scaling.original_seq": Moves(steps, {**YARN, "original_seq": 32}, too=(f"model.rope_scaling={YARN}",)),
    **{
        f"model.rope_scaling.{key}": Moves(steps, {**kind, key: value}, too=(f"model.rope_scaling={kind}",))
        for kind, changes in (
            (YARN, {"attention_factor": 1.5, "beta_fast": 2.0, "beta_slow": 0.1, "truncate": False}),
            (LLAMA, {"low_freq_factor": 0.5, "high_freq_factor": 64.0}),
            (LONG, {"long_factor": [3.0] * 8}),
            ({**LONG, "original_seq": 512}, {"short_factor": [1.0] * 8}),
        )
        for key, value in changes.items()
    },
    "model.nope_layers": Moves(steps, [0]),
    "model.embedding_scale": Moves(steps, 2.0),
    "model.residual_scale": Moves(steps, 0.5),
    "model.logits_scale": Moves(steps, 0.5),
    "model.attention.target_density": Moves(lambda trainer: (steps(trainer), scales(trainer))[1], 0.5),
    "model.attention.backend": Moves(lambda trainer: trainer.model_config.attention.backend, "reference"),
    "model.attention.type": Refused("full"),
    "model.attention.chunk_size": Refused(32),
    "model.attention.routing_block": Moves(steps, 4),
    "model.attention.routing_window": Moves(steps, 3),
    "model.attention.routing_scale": Moves(steps, 500.0),
    "model.attention.initial_density": Refused(0.5),
    "model.attention.router_warmup_steps": Moves(steps, 3),
    "model.attention.prior_normalizer": Moves(steps, "none"),
    "model.attention.prior_temperature": Moves(steps, 5.0),
    "data.sources.type": Refused("text", names="data.sources"),
    "data.sources.path": Refused("{other}", names="data.sources"),
    "data.sources.field": Refused("second", names="data.sources"),
    "data.sources.template": Refused("'{text} {second}'", names="data.sources"),
    "data.sources.weight": Refused(0.5, names="data.sources"),
    "data.sources.max_passes": Refused(5, names="data.sources"),
    "data.sources.length_weights": Refused("{1: 2}", names="data.sources"),
    "data.weight_by": Refused("tokens"),
    "data.stages.from_step": Elsewhere("tests/data/test_in_training.py"),
    "data.stages.weights": Elsewhere("tests/data/test_in_training.py"),
    "data.validation.path": Elsewhere("tests/data"),
    "data.cache": Moves(rows, "{other_cache}"),
    "data.validation_fraction": Refused(0.4),
    "data.shard_tokens": Refused(2048),
    "data.seed": Refused(1),
    "data.tokenizer.path": Refused("{tokenizer}", names="data.tokenizer.path"),
    "data.tokenizer.vocab_size": Refused(600),
    "data.tokenizer.training_sentences": Refused(100),
    "data.on_bad_document": Moves(rows, "skip"),
    "data.workers": Moves(config, 2),
    "optimizer.type": Refused("muon"),
    "optimizer.momentum": Moves(steps, 0.5, ("optimizer.type=muon",)),
    "optimizer.lr": Moves(steps, 1e-2),
    "optimizer.betas": Moves(steps, [0.5, 0.6]),
    "optimizer.eps": Moves(steps, 1e-2),
    "optimizer.weight_decay": Moves(steps, 5.0),
    "optimizer.grad_clip": Moves(steps, 0.01),
    "optimizer.ema": Moves(kept, 0.9),
    "schedule.type": Moves(steps, "constant"),
    "schedule.steps": Moves(steps, 100),
    "schedule.warmup_steps": Moves(steps, 4),
    "schedule.decay_steps": Moves(steps, 2, WSD),
    "schedule.decay": Moves(steps, "linear", (*WSD, "schedule.decay_steps=2")),
    "schedule.min_lr_ratio": Moves(steps, 0.9),
    "train.steps": Moves(steps, 5),
    "train.seq": Refused(256),
    "train.micro_batch_size": Moves(lambda trainer: trainer.micro_batches, 4),
    "train.global_batch_size": Moves(steps, 4),
    "train.precision": Moves(steps, "bf16"),
    "train.activation_checkpointing": Moves(config, "full"),
    "train.activation_offload": Elsewhere("test_trainer.py: all that there is"),
    "train.seed": Refused(1),
    "train.validate_every": Moves(validation, 1, ("train.validate_every=2",)),
    "train.validation_rows": Moves(validation, 2, ("train.validate_every=2",)),
    "train.skip_steps": Moves(logged, [[3, 3]]),
    "train.max_nonfinite_steps": Moves(config, 1),
    "train.on_spike": Moves(config, "rollback"),
    "train.spike_threshold": Moves(lambda trainer: trainer.spikes.threshold, 3.0),
    "train.time_limit": Moves(saved, 0.1),
    "parallel.zero_stage": Moves(lambda trainer: trainer.engine.zero_optimization_stage(), 3),
    "parallel.offload_optimizer": Moves(engine, "cpu"),
    "parallel.offload_parameters": Moves(engine, "cpu", ("parallel.zero_stage=3", "parallel.offload_optimizer=cpu")),
    "parallel.context": Elsewhere("test_topologies.py"),
    "parallel.context_method": Elsewhere("test_parallel.py"),
    "parallel.timeout_seconds": Moves(lambda trainer: trainer.watchdog.timeout_seconds, 5.0),
    "checkpoint.every": Moves(saved, 1, ("checkpoint.keep_last=9",)),
    "checkpoint.keep_last": Moves(saved, 1),
    "checkpoint.keep_every": Moves(saved, 1, ("checkpoint.every=1", "checkpoint.keep_last=1")),
    "checkpoint.keep_best": Moves(saved, 2, ("checkpoint.every=1", "checkpoint.keep_last=1", "train.validate_every=1")),
    "checkpoint.copy_to": Moves(copied, "{copy}"),
    "checkpoint.asynchronous": Moves(lambda trainer: trainer.saver.config.asynchronous, False),
    "tracking.log_every": Moves(logged, 2),
    "tracking.wandb": Moves(written, "offline"),
    "tracking.project": Moves(config, "other"),
    "tracking.router_gradients_every": Moves(logged, 1),
    "tracking.compare_ranks_every": Moves(lambda trainer: trainer.slow_ranks.every, 5),
    "tracking.tensorboard": Elsewhere("tests/tracking/test_tensorboard.py"),
    "tracking.profile.steps": Moves(written, {"steps": [3, 3]}),
    "deepspeed": Moves(engine, {"zero_optimization": {"reduce_bucket_size": 1000}}),
}

OF_OTHER_SOURCES = (
    "documents of other types of sources: tests/data; the rows that they make are compared, as the path's"
)
TABLE |= {
    f"data.{section}.{key}": Elsewhere(OF_OTHER_SOURCES)
    for section in ("sources", "validation")
    for key in ("data_files", "name", "split", "streaming", "streams", "documents", "supervised")
}
TABLE |= {
    f"data.validation.{key}": Elsewhere("as data.validation.path")
    for key in ("type", "field", "template", "weight", "max_passes", "length_weights")
}
TABLE |= {key: Elsewhere("test_stages.py") for key in recipe_keys() if key.startswith("stages.")}


def override(key, value):
    """A change as on a command line; of a section that is null before, or of a list, the whole."""
    if isinstance(value, dict) and key != "deepspeed":
        key = key.rpartition(".")[0]
    key = key.replace("data.sources.", "data.sources.0.")
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, corpus):
    """Folders that the changes name."""
    folder = tmp_path_factory.mktemp("keys")
    for name, package in (("text", "email"), ("other", "json")):
        texts = [path.read_text() for path in sorted((corpus / package).rglob("*.py"))]
        parts = [text[at : at + 2000] for text in texts for at in range(0, len(text), 2000)]
        rows = [{"text": text, "second": text.upper()} for text in parts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "folder": folder,
        "other": folder / "other.jsonl",
        "other_cache": folder / "other-cache",
        "copy": folder / "copy",
    }


def recipe_for(folder, places, changes):
    path = write_recipe(
        folder / "recipe.yaml",
        places["folder"] / "corpus",
        data__sources=[{"type": "jsonl", "path": str(places["folder"] / "text.jsonl")}],
        train__steps=4,
        train__validate_every=0,
        train__validation_rows=8,
        checkpoint__every=2,
    )
    for name, place in places.items():
        changes = [change.replace(f"{{{name}}}", str(place)) for change in changes]
    return load_recipe(path, changes)


@pytest.fixture(scope="module")
def trained(places):
    """Runs of two steps, by what they were given beside the change; each resume has a copy."""
    made = {}

    def run(too):
        if too not in made:
            folder = places["folder"] / f"base-{len(made)}"
            train(recipe_for(folder, places, ["train.steps=2", "schedule.steps=4", *too]))
            made[too] = folder / "run"
        return made[too]

    return run


@pytest.fixture(scope="module")
def unchanged(trained, places):
    """What a resume shows without a change, by how it is looked at and what it was given."""
    seen = {}

    def look(moves):
        known = (moves.look, moves.too)
        if known not in seen:
            folder = places["folder"] / f"unchanged-{len(seen)}"
            shutil.copytree(trained(moves.too), folder / "run")
            seen[known] = moves.look(Trainer(recipe_for(folder, places, ["schedule.steps=4", *moves.too])))
        return seen[known]

    return look


def test_every_key_has_a_line():
    sections = {key for key in recipe_keys() if any(other.startswith(f"{key}.") for other in recipe_keys())}
    assert sorted(set(recipe_keys()) - sections - TABLE.keys()) == [], "say what a change of it does on a resume"
    assert sorted(TABLE.keys() - set(recipe_keys())) == [], "there is no such key any more"


@pytest.mark.parametrize("key", [key for key, line in TABLE.items() if isinstance(line, Moves)])
def test_it_takes_effect(trained, unchanged, places, tmp_path, key):
    moves = TABLE[key]
    shutil.copytree(trained(moves.too), tmp_path / "run")
    after = moves.look(
        Trainer(recipe_for(tmp_path, places, ["schedule.steps=4", *moves.too, override(key, moves.value)]))
    )
    assert after != unchanged(moves)


@pytest.mark.parametrize("key", [key for key, line in TABLE.items() if isinstance(line, Refused)])
def test_it_is_refused_by_name(trained, places, tmp_path, key):
    refused = TABLE[key]
    shutil.copytree(trained(refused.too), tmp_path / "run")
    base = {**places, "run": trained(()), "tokenizer": trained(("data.tokenizer.vocab_size=600",)) / "tokenizer"}
    with pytest.raises((UserError, DataError), match=refused.names or key):
        Trainer(recipe_for(tmp_path, base, ["schedule.steps=4", *refused.too, override(key, refused.value)]))
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run")).step == 2, "nothing was lost"
