import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import write_recipe

from dash_train.data.tokenizer import load_tokenizer
from dash_train.errors import UserError
from dash_train.huggingface.export import export_run
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.initial import open_source
from dash_train.training.trainer import Trainer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus):
    """A run folder, and its export."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = write_recipe(folder / "recipe.yaml", corpus, train__steps=8, train__validate_every=0)
    Trainer(load_recipe(recipe)).train()
    export_run(folder / "run", folder / "export")
    return folder


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "text"
    shutil.copytree(
        Path(sysconfig.get_path("stdlib")) / "unittest", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def finetune_recipe(path, text, source, model=None, **options):
    """A recipe without tokenizer, and without model section unless one is given: both come from the weights."""
    write_recipe(path, text, init={"from": str(source)}, model=model or {}, **options)
    recipe = yaml.safe_load(path.read_text())
    del recipe["data"]["tokenizer"]
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path, ["model.attention.chunk_size=16"])


@pytest.mark.parametrize("source", ["export", "run"])
def test_twenty_steps_lower_the_loss_on_new_data(pretrained, other_text, tmp_path, source):
    options = {"train__steps": 20, "train__validate_every": 20, "checkpoint__every": 20}
    recipe = finetune_recipe(tmp_path / "recipe.yaml", other_text, pretrained / source, **options)
    trainer = Trainer(recipe)
    assert recipe.data.tokenizer.path is None, "a caller's recipe stays as it was"
    before = checkpoint.load_weights(pretrained / "run")
    for name, parameter in trainer.engine.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
    assert trainer.tokenizer.hash == load_tokenizer(pretrained / source / ("tokenizer" if source == "run" else "")).hash
    trainer.train()
    _, validation = read_metrics(tmp_path / "run")
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"] - 0.1
    scales = checkpoint.load_model_config(checkpoint.find(pretrained / "run")).attention.routing_scale
    assert trainer.model_config.attention.routing_scale == scales, "the scales belong to the weights"


def test_a_fine_tuned_run_goes_on_without_its_base(pretrained, other_text, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pretrained / "export", base)
    options = {"train__validate_every": 0}
    Trainer(finetune_recipe(tmp_path / "recipe.yaml", other_text, base, train__steps=2, **options)).train()
    shutil.rmtree(base)
    trainer = Trainer(finetune_recipe(tmp_path / "recipe.yaml", other_text, base, train__steps=4, **options))
    assert trainer.step == 2
    trainer.train()


def test_a_checkpoint_out_of_its_run_needs_a_tokenizer(pretrained, tmp_path):
    copy = tmp_path / "deep" / "copy"
    shutil.copytree(checkpoint.find(pretrained / "run"), copy)
    with pytest.raises(UserError, match="needs a copy of the run's tokenizer folder"):
        open_source(copy)
    shutil.copytree(pretrained / "run" / "tokenizer", copy / "tokenizer")
    assert open_source(copy).tokenizer == copy / "tokenizer"
    export_run(copy, tmp_path / "export")


def test_full_attention_weights_become_dash(pretrained, other_text, tmp_path, corpus):
    shape = checkpoint.load_model_config(checkpoint.find(pretrained / "run")).model_dump(exclude={"attention"})
    full = write_recipe(
        tmp_path / "full" / "recipe.yaml",
        corpus,
        model={**shape, "attention": {"type": "full", "chunk_size": 16}},
        train__steps=2,
    )
    Trainer(load_recipe(full)).train()
    export_run(tmp_path / "full" / "run", tmp_path / "export")
    recipe = finetune_recipe(
        tmp_path / "recipe.yaml", other_text, tmp_path / "export", {"attention": {"type": "dash"}}, train__steps=2
    )
    trainer = Trainer(recipe)
    trainer.train()
    training, _ = read_metrics(tmp_path / "run")
    assert all(density is not None for density in training[0]["density"])
    assert trainer.engine.module.model.layers[0].self_attn.chunk_query.abs().max() > 0, "the router learns"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64}, "has shape [512, 32] in"),
        ({"layers": 3}, "holds no model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 64}, "model.vocab_size (64) is smaller than the tokenizer's (512)"),
    ],
)
def test_weights_of_another_shape_are_refused(pretrained, other_text, tmp_path, model, message):
    with pytest.raises(UserError) as error:
        Trainer(finetune_recipe(tmp_path / "recipe.yaml", other_text, pretrained / "export", model))
    assert message in str(error.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"init\.from: .* expected a run folder, a checkpoint or an exported folder"):
        open_source(tmp_path)


def test_finetuning_needs_weights(tmp_path, corpus, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "launch"))
    import finetune

    with pytest.raises(UserError, match=r"init\.from is required"):
        finetune.main(finetune.recipe_parser("").parse_args([str(write_recipe(tmp_path / "recipe.yaml", corpus))]))
    sys.modules.pop("finetune")
