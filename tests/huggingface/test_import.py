"""Folders that others wrote: what is read, and what is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export_folder
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dash_train.errors import UserError
from dash_train.huggingface.conversion import load_model, read_eos_ids, read_folder, without_padding
from dash_train.huggingface.export import export_run
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import Recipe
from dash_train.training.initial import open_source, resolve_model

Build = Callable[..., LanguageModel]
ROUTING = {"chunk_size": 16, "estimate_diagonal": True, "sigma": 2.0, "scaling_factor": 8.0}


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, torch.float32, "cpu")(torch.arange(60)[None])["logits"]


def test_old_buffers_are_passed_over(tiny_model: Build, tmp_path: Path) -> None:
    folder = export_folder(tiny_model(), tmp_path)
    before = logits_of(folder)
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits_of(folder), before)


def to_authors(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.endswith("chunk_query")]:
        weights[name.replace("chunk_query", "indexer_q")] = weights.pop(name).flatten()


@pytest.mark.parametrize("attention", ["dash", "mixed"])
def test_the_authors_checkpoints_are_read(attention: str, tiny_model: Build, tmp_path: Path) -> None:
    """indexer_q becomes chunk_query, and their fields in config.json say how it routes."""
    model = tiny_model(attention, routing={"prior_normalizer": "geometric_mean", "prior_temperature": 2.0})
    folder = export_folder(model, tmp_path)
    expected = logits_of(folder)
    change_weights(folder, to_authors)
    plain = export_folder(tiny_model("full"), tmp_path / "plain") / "config.json"
    (folder / "config.json").write_text(plain.read_text())
    with pytest.raises(UserError, match="no chunk_size, estimate_diagonal, sigma, scaling_factor, which"):
        read_folder(folder)
    change_config(folder, **ROUTING)
    torch.testing.assert_close(logits_of(folder), expected)
    config, load = read_folder(folder)
    assert config.attention_type(1) == "dash"
    assert load()["model.layers.1.self_attn.chunk_query"].shape == (2, 16)


def test_mistral_without_a_shorter_window_is_a_llama(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=None, **shape))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path), theirs(torch.arange(60)[None]).logits, atol=1e-4, rtol=0)
    change_config(tmp_path, sliding_window=4096, max_position_embeddings=32768)
    with pytest.raises(UserError, match="sliding_window 4096, shorter than max_position_embeddings"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(surplus=torch.ones(2)), r"0 missing .* 1 unknown \(first: \['surplus'\]"),
        (lambda w: w.pop("model.norm.weight"), r"1 missing \(first: \['model.norm.weight'\]"),
        (lambda w: w.update({"model.norm.weight": torch.ones(7)}), r"norm.weight has shape \[7\], by .* \[32\]"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), r"q_proj.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tiny_model: Build, tmp_path: Path) -> None:
    """Before anything is trained: by whoever opens the folder."""
    folder = export_folder(tiny_model(), tmp_path)
    change_weights(folder, change)
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: not supported"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types sliding_attention: not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: not supported"),
        ({"num_key_value_heads": 3}, r"config.json: .*heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_scaling .* is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_scaling .* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "scale": 1.0}}, "rope_scaling .* is not supported"),
    ],
)
def test_configurations_that_we_cannot_follow_are_refused(
    changes: dict, message: str, tiny_model: Build, tmp_path: Path
) -> None:
    folder = export_folder(tiny_model(), tmp_path)
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[]", "config.json: expected an object with fields, found list"),
        ("config.json", b"{}", "config.json: no model_type"),
        ("model.safetensors", b"broken", "model.safetensors: not a safetensors file"),
        ("model.safetensors", None, "no model.safetensors here"),
    ],
)
def test_broken_files_are_one_line(
    name: str, content: bytes | None, message: str, tiny_model: Build, tmp_path: Path
) -> None:
    folder = export_folder(tiny_model(), tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path, max_shard_size="30KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: not here, though model.safetensors.index.json names it"):
        read_folder(tmp_path)


def test_all_tokens_that_end_a_text_are_read(tmp_path: Path) -> None:
    assert read_eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert read_eos_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_eos_ids(tmp_path) == (7, 9)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_an_export_leaves_out_the_padding_of_the_vocabulary(tie_embeddings: bool, tiny_model: Build) -> None:
    model = tiny_model("dash", tie_embeddings=tie_embeddings)
    weights, config = without_padding(model.state_dict(), model.config, 61)
    assert config.vocab_size == 61
    smaller = LanguageModel(config)
    smaller.load_state_dict(weights)
    tokens = torch.randint(61, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(smaller(tokens)["logits"], model(tokens)["logits"][..., :61])


def test_the_authors_weights_keep_their_routing_in_a_recipe(tiny_model: Build, tmp_path: Path) -> None:
    """Also where the recipe says once more that they are Dash."""
    model = tiny_model("dash", routing={"prior_normalizer": "geometric_mean", "prior_temperature": 2.0})
    export_run(export_folder(model, tmp_path), tmp_path / "authors", layout="authors")
    recipe = Recipe.model_validate(
        {"run_dir": "x", "init": {"from": "y"}, "model": {"attention": {"type": "dash"}}, "train": {"seq": 128}}
    )
    resolved = resolve_model(recipe, open_source(tmp_path / "authors"), 64).model.attention
    assert (resolved.chunk_size, resolved.routing_scale, resolved.prior_temperature) == (16, 8.0, 2.0)
