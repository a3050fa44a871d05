"""Models of other architectures: made by transformers, read by us, written again, read by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from dash_train.huggingface.conversion import load_model, read_folder
from dash_train.huggingface.export import export_run, import_folder
from dash_train.inference.generation import generate
from dash_train.model.config import ModelConfig, RopeScaling
from dash_train.model.rotary import rotary_frequencies
from dash_train.model.transformer import LanguageModel

logging.set_verbosity_error()
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "attention_multiplier": 8**-0.5,
    },
}
DIVISORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "yarn, attention_factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "attention_factor": 0.8,
        "beta_fast": 16.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 12, **DIVISORS},
    "longrope, attention_factor": {"original_max_position_embeddings": 12, "attention_factor": 1.3, **DIVISORS},
}


def make(folder: Path, family: str, rope: str = "default", **changes: Any) -> Any:
    """A model that transformers has made and saved, with norms and biases that are not trivial."""
    parameters = {"rope_type": rope.partition(",")[0], "rope_theta": 1e4, **ROPE[rope]}
    values = {**SHAPE, **FAMILIES[family], "rope_parameters": parameters, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None  # untrained models end anywhere
    return model


def assert_alike(folder: Path, theirs: Any, seq: int = 70) -> None:
    """Logits and greedy tokens, also of rows beyond the trained context."""
    model = load_model(folder, torch.float32, "cpu")
    tokens = torch.randint(64, (2, seq))
    with torch.no_grad():
        for length in (10, seq):
            logits = model(tokens[:, :length])["logits"]
            torch.testing.assert_close(logits, theirs(tokens[:, :length]).logits, atol=1e-4, rtol=0)
    prompts = tokens[:, :10]
    new = torch.tensor(list(generate(model, prompts.tolist(), max_new_tokens=45))).T
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=45, do_sample=False)
    assert torch.equal(new, expected[:, 10:])


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_and_written(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", family, tie_word_embeddings=tied)
    assert_alike(tmp_path / "theirs", theirs)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = "LlamaForCausalLM" if family == "mistral" else type(theirs).__name__
    assert type(again).__name__ == expected
    tokens = torch.randint(64, (2, 70))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    import_folder(tmp_path / "ours", tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("rope", ROPE)
def test_every_rope_is_read_and_written(rope: str, tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", "llama", rope)
    assert_alike(tmp_path / "theirs", theirs)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    again.generation_config.eos_token_id = None
    assert_alike(tmp_path / "ours", again)
    tokens = torch.randint(64, (2, 70))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    import_folder(tmp_path / "ours", tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again")


def test_minicpm_is_granite_in_other_words(tmp_path: Path) -> None:
    """transformers has no MiniCPM4: its authors' code multiplies as Granite's does."""
    theirs = make(tmp_path, "granite", embedding_multiplier=12.0, residual_multiplier=1.4 / 2, logits_scaling=32 / 8)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        del values[name]
    values |= {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8}
    values["tie_word_embeddings"] = False
    values["auto_map"] = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "configuration_minicpm.py").write_text("raise RuntimeError('executed')")
    if "lm_head.weight" not in read_names(tmp_path):
        pytest.skip("saved as tied")
    assert_alike(tmp_path, theirs)


def read_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as opened:
        return set(opened.keys())


def test_what_no_architecture_says_becomes_ours(tmp_path: Path, tiny_model: Callable[..., LanguageModel]) -> None:
    """Biases with norms of queries and keys: transformers has either, so the export brings its own code."""
    theirs = make(tmp_path / "theirs", "qwen2")
    config, load = read_folder(tmp_path / "theirs")
    both = ModelConfig.model_validate({**config.model_dump(), "qk_norm": True})
    model = LanguageModel(both)
    model.load_state_dict(load(), strict=False)
    from exported import export_folder

    out = export_folder(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(out)
    again.generation_config.eos_token_id = None
    assert type(again).__name__ == "DashForCausalLM"
    assert_alike(out, again)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"


def test_a_dash_export_is_imported_to_the_same_files(tmp_path: Path, tiny_model: Callable[..., LanguageModel]) -> None:
    from exported import export_folder

    rope = RopeScaling(type="yarn", factor=4, original_seq=32, attention_factor=0.9)
    out = export_folder(tiny_model("blocks", tie_embeddings=True, rope_scaling=rope), tmp_path, torch.bfloat16)
    import_folder(out, tmp_path / "again")
    assert_same_files(out, tmp_path / "again")


def test_the_authors_format_goes_both_ways(tmp_path: Path, tiny_model: Callable[..., LanguageModel]) -> None:
    from exported import export_folder

    routing = {"prior_normalizer": "geometric_mean", "prior_temperature": 2.0}
    out = export_folder(tiny_model("mixed", routing=routing, qk_norm=True), tmp_path)
    export_run(out, tmp_path / "authors", layout="authors")
    values = json.loads((tmp_path / "authors/config.json").read_text())
    said = {name: values[name] for name in ("chunk_size", "estimate_diagonal", "sigma", "scaling_factor")}
    assert said == {"chunk_size": 16, "estimate_diagonal": True, "sigma": 2.0, "scaling_factor": 8.0}
    assert values["model_type"] == "qwen3"
    assert "model.layers.1.self_attn.indexer_q" in read_names(tmp_path / "authors")
    import_folder(tmp_path / "authors", tmp_path / "again")
    model, again = (load_model(folder, torch.float32, "cpu") for folder in (out, tmp_path / "again"))
    tokens = torch.randint(64, (2, 70))
    assert torch.equal(again(tokens)["logits"], model(tokens)["logits"])
    export_run(tmp_path / "again", tmp_path / "authors again", layout="authors")
    assert_same_files(tmp_path / "authors", tmp_path / "authors again")


def test_dynamic_scaling_of_short_rows_is_none() -> None:
    scaling = RopeScaling(type="dynamic", factor=2, original_seq=64)
    plain, _ = rotary_frequencies(16, 1e4, None)
    short, factor = rotary_frequencies(16, 1e4, scaling, 64)
    assert factor == 1.0
    torch.testing.assert_close(short, plain)
    assert (rotary_frequencies(16, 1e4, scaling, 65)[0][1:] < plain[1:]).all()
