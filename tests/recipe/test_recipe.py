import os

import pytest
import torch
from tiny_runs import ROOT

from dash_train.errors import UserError
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.docs import recipe_markdown
from dash_train.recipe.load import load_recipe
from dash_train.training.engine import deepspeed_config

LAUGHS = "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run_dir: runs/x\ntrain:\n  steps: 1000\n  seq: 1024\n")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds(path):
    recipe = load_recipe(path)
    config = recipe.model
    config.vocab_size = config.vocab_size or recipe.data.tokenizer.vocab_size
    with torch.device("meta"):
        model = LanguageModel(config, activation_checkpointing=recipe.train.activation_checkpointing)
    assert deepspeed_config(recipe)["zero_optimization"]["stage"] == recipe.parallel.zero_stage
    parameters = sum(parameter.numel() for parameter in model.parameters())
    by_name = {"quickstart": 2.4e6, "mixture": 0.8e6, "125m": 1.1e8, "1b": 1.19e9, "8b": 7.5e9}
    size = by_name.get(path.stem.split("-")[0], 1e8)  # those that start from weights have the shape of these
    assert 0.8 * size < parameters < 1.2 * size


def test_recipe_page_is_current():
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_markdown(), "run `make docs`"


def test_overrides_replace_values(recipe):
    source = "data.sources=[{type: text, path: a}]"
    loaded = load_recipe(recipe, ["train.steps=200", "optimizer.lr=1e-3", source, "init.from=b"])
    assert (loaded.train.steps, loaded.optimizer.lr, loaded.data.sources[0].path) == (200, 1e-3, os.path.abspath("a"))
    assert loaded.init.from_ == os.path.abspath("b")
    (changed,) = load_recipe(recipe, ["data.sources=[{path: a}]", "data.sources.0.path=c"]).data.sources
    assert changed.path == os.path.abspath("c")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=1", "train.step: unknown key; did you mean train.steps?"),
        ("steps=1", "steps: unknown key; did you mean train.steps?"),
        ("data.sources=[{pth: a}]", "data.sources.0.pth: unknown key; did you mean data.sources.0.path?"),
        ("train.steps=many", "train.steps: should be a valid integer"),
        ("train.steps=0", "train.steps: should be greater than 0, found 0"),
        ("model.attention.routing_scale=a", "model.attention.routing_scale: should be a valid number"),
        ("model.heads=5", "model: heads (5) must be a multiple of kv_heads (2)"),
        ("model.attention.type=[dash, full]", "model: attention.type lists 2 values for 12 layers"),
        ("model.attention.routing_block=3", "model.attention: routing_block (3) must divide chunk_size (64)"),
        ("model.attention.routing_block=[1, 128]", "model.attention: routing_block (128) must divide chunk_size (64)"),
        ("model.attention.routing_block=[1, 16]", "model: attention.routing_block lists 2 values for 12 layers"),
        ("model.attention.routing_window=0", "model.attention.routing_window: should be greater than 0"),
        ("model.attention.routing_window=[1]", "model: attention.routing_window lists 1 values for 12 layers"),
        ("train.seq=1000", "train.seq (1000) must be a multiple of model.attention.chunk_size (64)"),
        ("train.micro_batch_size=3", "train.global_batch_size (8) must be a multiple of train.micro_batch_size (3)"),
        ("parallel.zero_stage=0", "train.precision bf16 needs parallel.zero_stage 1, 2 or 3"),
        ("train.activation_offload=true", "needs train.activation_checkpointing: full or selective"),
        ("parallel={zero_stage: 0, offload_optimizer: cpu}", "offload_optimizer: cpu needs zero_stage 1, 2 or 3"),
        ("parallel={zero_stage: 3, offload_parameters: cpu}", "needs zero_stage 3 and offload_optimizer: cpu"),
        ("parallel={offload_optimizer: cpu, offload_parameters: cpu}", "needs zero_stage 3 and offload_optimizer"),
        ("train.steps", "expected key.sub=value"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr: expected a finite number of at most 1e+30"),
        ("optimizer.weight_decay=1e300", "optimizer.weight_decay: expected a finite number of at most 1e+30"),
        ("train.seed=18446744073709551616", "train.seed: expected a finite number of at most 64 bits"),
        ("run_dir=$NOWHERE_SET/x", "run_dir: $NOWHERE_SET/x: the variable $NOWHERE_SET is not set"),
        ("run_dir=' '", "run_dir: expected a path"),
        ("run_dir=*.txt", "text with such signs needs quotes of its own: run_dir=\"'*.txt'\""),
        ("train.steps={{ steps }}", "a key must be plain text; was a {{ template }} left in?"),
        ("train.steps=2024-13-45", "month must be in 1..12"),
        ("train={steps: 1, steps: 2}", "steps is set twice"),
        ("run_dir.x=1", "names nothing in this recipe"),
    ],
)
def test_wrong_values_are_named(recipe, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_reaches_no_farther_than_the_piece_before(recipe):
    options = ["train.seq=512", "parallel.context=2", "model.attention.routing_window=130"]
    with pytest.raises(UserError, match=r"routing_window \(130\) must be at most .* = 129"):
        load_recipe(recipe, options)
    load_recipe(recipe, [*options, "parallel.context_method=ulysses"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: x\ntrain:\n  stepz: 1\n", "recipe.yaml:3: train.stepz: unknown key; did you mean train.steps?"),
        ("train: {}\n", "run_dir: is required"),
        ("run_dir: x\nrun_dir: y\n", "recipe.yaml:2: run_dir is set twice (first in line 1)"),
        ("run_dir: [x\n", "recipe.yaml:2: not valid YAML"),
        ("run_dir: x\ntrain:\n  steps: {{ steps }}\n", "recipe.yaml:3: a key must be plain text"),
        ("run_dir: x\ndeepspeed: " + "[" * 3000 + "]" * 3000, "its values nest too deeply"),
        ("run_dir: x\ndeepspeed: &a {x: *a}\n", "its values nest too deeply, or hold themselves"),
        ("x0: &x0 [a, a]\n" + LAUGHS, "do its aliases multiply?"),
        ("run_dir: " + "x" * 2**20, "more than 1 MiB; is this a recipe?"),
        ("- a\n", "expected `section: ...` keys, found list"),
    ],
)
def test_wrong_files_are_named_with_their_line(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(recipe)
    assert message in str(error.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_recipe_that_is_not_utf_8_is_named(recipe, encoding):
    recipe.write_bytes("run_dir: runs/caf\u00e9\n".encode(encoding))
    with pytest.raises(UserError, match=r"recipe\.yaml:1: not UTF-8"):
        load_recipe(recipe)
    recipe.write_bytes("run_dir: runs/caf\u00e9\r\n".encode("utf-8-sig"))
    assert load_recipe(recipe).run_dir == os.path.abspath("runs/caf\u00e9")


def test_what_yaml_and_shells_take_for_granted(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    loaded = load_recipe(recipe, ["tracking.wandb=off", "run_dir=~/runs/x", "init.from=$DISK/base"])
    assert loaded.tracking.wandb == "off"
    assert (loaded.run_dir, loaded.init.from_) == ("/home/me/runs/x", "/disk/base")
    sources = load_recipe(recipe, ["data.sources.0.path=a", "data.sources.1.path=b"]).data.sources
    assert [source.path for source in sources] == [os.path.abspath(name) for name in "ab"]


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_resolved_recipe_loads_again(recipe, tmp_path):
    loaded = load_recipe(recipe, ["init.from=a"])
    loaded.save(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{gradient_cliping: 1}", "deepspeed.gradient_cliping: unknown key"),
        ("{gradient_clipping: 1}", "deepspeed.gradient_clipping: set optimizer.grad_clip in the recipe instead"),
        ("{zero_optimization: {stage: 1}}", "deepspeed.zero_optimization.stage: set parallel.zero_stage"),
        ("{zero_optimization: {offload_param: {}}}", "offload_param: set parallel.offload_parameters"),
        ("{zero_optimization: {reduce_bucket: 1}}", "deepspeed.zero_optimization.reduce_bucket: Extra inputs"),
        ("{zero_optimisation: {}}", "did you mean deepspeed.zero_optimization?"),
    ],
)
def test_wrong_deepspeed_keys_are_named(recipe, section, message):
    with pytest.raises(UserError) as error:
        deepspeed_config(load_recipe(recipe, [f"deepspeed={section}"]))
    assert message in str(error.value)


def test_deepspeed_keys_are_merged(recipe):
    config = deepspeed_config(load_recipe(recipe, ["deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"]))
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2


def test_offload_keys_reach_deepspeed(recipe):
    keys = "parallel={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"
    config = deepspeed_config(load_recipe(recipe, [keys]))
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False
