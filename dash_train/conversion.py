"""Models as Hugging Face folders: written by `export`, read back by `load_model`.

A model whose layers all have full attention is exported as plain `LlamaForCausalLM` (`Qwen3ForCausalLM` with qk_norm),
which needs nothing of ours; one with Dash layers as `DashForCausalLM` (dash_train/huggingface.py). Any Llama or Qwen3
folder can be read.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig, RopeScaling
from dash_train.model.transformer import LanguageModel

MODEL_TYPE = "dash_train"
MODELING_FILE = "modeling_dash_train"
MODELING_CODE = '''"""The model's code is the dash-train package: pip install dash-train."""

from dash_train.huggingface import DashConfig, DashForCausalLM

__all__ = ["DashConfig", "DashForCausalLM"]
'''
MAX_SHARD_SIZE = "5GB"


def export(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    max_seq: int,
    dtype: torch.dtype,
    card: str,
) -> None:
    """Write a folder that transformers loads, complete or not at all.

    Args:
        weights: by state-dict name.
        config: the weights' model; its routing scales must be numbers.
        tokenizer: written in Hugging Face's format.
        out: the folder, new or empty.
        max_seq: the longest context the model was trained on, in tokens (`max_position_embeddings`).
        dtype: of the written weights.
        card: README.md, in Markdown.

    Raises:
        UserError: `out` already holds something.
    """
    from huggingface_hub import save_torch_state_dict

    out = Path(out)
    check_new(out)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    values = huggingface_config(config, max_seq)
    tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    _write_json(temporary / "config.json", {**values, **tokens, "dtype": str(dtype).removeprefix("torch.")})
    _write_json(temporary / "generation_config.json", tokens)
    if values["model_type"] == MODEL_TYPE:
        (temporary / f"{MODELING_FILE}.py").write_text(MODELING_CODE)
    (temporary / "README.md").write_text(card)
    tokenizer.save_huggingface(temporary)
    if config.tie_embeddings:
        weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    weights = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    save_torch_state_dict(weights, temporary, max_shard_size=MAX_SHARD_SIZE)
    for file in temporary.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable to their owner alone

    if out.exists():
        out.rmdir()
    temporary.rename(out)


def check_new(out: Path) -> None:
    """Refuse to write a folder over something: `out` must not exist, or be an empty folder.

    Raises:
        UserError: it is neither.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name a new folder, or remove it first")


def load_model(folder: str | Path, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
    """The model of an exported folder, or of any Hugging Face folder with a Llama or Qwen3 model.

    Raises:
        UserError: the folder holds no such model.
    """
    config, read_weights = read_folder(folder)
    return assemble(config, read_weights(), dtype, device, folder)


def assemble(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype, device: str | torch.device, origin: str | Path
) -> LanguageModel:
    """A model of weights by state-dict name, without gradients; `origin` is where they come from.

    Raises:
        UserError: they are not those of the configuration.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    weights = {name: weight.to(device, dtype) for name, weight in weights.items()}
    _check_names(Path(origin), set(weights), set(model.state_dict()))
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def read_folder(folder: str | Path) -> tuple[ModelConfig, Callable[[], dict[str, Tensor]]]:
    """The configuration of a Hugging Face folder, and a function that reads its weights by state-dict name.

    Raises:
        UserError: the folder holds no model that we know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here; expected an exported folder or a Hugging Face model folder")
    values = json.loads((folder / "config.json").read_text())
    config = model_config(values, folder)
    return config, lambda: _read_weights(folder, config)


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All weights on the CPU, in the files' own type; those that are tied, twice."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model*.safetensors here; expected the weights in the safetensors format")
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _check_names(folder: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise UserError(
            f"{folder}: the weights do not fit config.json: "
            f"{len(missing)} missing (first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})"
        )


def huggingface_config(config: ModelConfig, max_seq: int) -> dict[str, Any]:
    """The config.json of a model, without the tokenizer's part."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "max_position_embeddings": max_seq,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if any(config.attention_type(layer) == "dash" for layer in range(config.layers)):
        auto_map = {
            "AutoConfig": f"{MODELING_FILE}.DashConfig",
            "AutoModelForCausalLM": f"{MODELING_FILE}.DashForCausalLM",
        }
        model = config.model_dump(mode="json")
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["DashForCausalLM"],
            "auto_map": auto_map,
            **values,
            "model": model,
        }
    model_type, architecture = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        **values,
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_values(config.rope_scaling) if config.rope_scaling else None,
    }


def model_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    """The configuration that a config.json means; `folder` is named in errors.

    Raises:
        UserError: it asks for something that our models cannot do.
    """
    if values["model_type"] == MODEL_TYPE:
        return ModelConfig.model_validate(values["model"])
    if values["model_type"] not in ("llama", "qwen3"):
        raise UserError(
            f"{folder}: model_type {values['model_type']!r} is not supported; expected llama, qwen3 or {MODEL_TYPE}"
        )
    # Configurations written by transformers 5 keep both in rope_parameters.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    heads = values["num_attention_heads"]
    unsupported = [name for name in ("attention_bias", "mlp_bias", "use_sliding_window") if values.get(name, False)]
    if values.get("hidden_act", "silu") != "silu":
        unsupported.append(f"hidden_act {values['hidden_act']}")
    if unsupported:
        raise UserError(f"{folder}/config.json: {', '.join(unsupported)}: not supported by our models")
    return ModelConfig(
        layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        mlp_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        qk_norm=values["model_type"] == "qwen3",
        norm_eps=values["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or values.get("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope, values, folder),
        init_std=values.get("initializer_range", 0.02),
        attention={"type": "full"},
    )


def _rope_values(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` entry of a config.json."""
    values = {
        "rope_type": scaling.type,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_seq,
    }
    if scaling.type == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.type == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return values


def _rope_scaling(rope: dict[str, Any], values: dict[str, Any], folder: Path) -> RopeScaling | None:
    """The inverse of `_rope_values`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    options = ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", *options}
    if kind not in ("linear", "yarn", "llama3") or set(rope) - known:
        raise UserError(
            f"{folder}/config.json: rope_scaling {rope} is not supported; expected linear, yarn or llama3 with "
            f"{', '.join(sorted(known))}"
        )
    original_seq = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    given = {name: rope[name] for name in options if name in rope}
    return RopeScaling(type=kind, factor=rope["factor"], original_seq=original_seq, **given)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
