"""Models as Hugging Face folders: written by `export`, read back by `load_model`.

A model whose layers all have full attention is exported as plain `LlamaForCausalLM` (`Qwen3ForCausalLM` with qk_norm),
which needs nothing of ours; one with Dash layers as `DashForCausalLM` (modeling.py). Llama, Mistral and Qwen3 folders
can be read, and the DashAttention checkpoints of its authors.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.model.config import ModelConfig, RopeScaling
from dash_train.model.transformer import LanguageModel

MODEL_TYPE = "dash_train"
MODEL_TYPES = ("llama", "mistral", "qwen3")  # of others that are ours in all that their configurations can say
MODELING_FILE = "modeling_dash_train"
MODELING_CODE = '''"""The model's code is the dash-train package."""

try:
    from dash_train.huggingface import DashConfig, DashForCausalLM, DashModel
except ImportError as error:
    raise ImportError("this model needs the dash-train package: `pip install .` in a checkout of DashTrain") from error

__all__ = ["DashConfig", "DashForCausalLM", "DashModel"]
'''
AUTO_MAP = {
    "AutoConfig": f"{MODELING_FILE}.DashConfig",
    "AutoModel": f"{MODELING_FILE}.DashModel",
    "AutoModelForCausalLM": f"{MODELING_FILE}.DashForCausalLM",
}
# How the authors' DashAttention checkpoints name what a router needs: in config.json, and as our attention's fields.
AUTHORS_FIELDS = ("chunk_size", "estimate_diagonal", "sigma", "scaling_factor")
AUTHORS_CHUNK_QUERY = "self_attn.indexer_q"
OLD_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # computed, not learned; once saved along
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
    _name_tokenizer_for_all_versions(temporary / "tokenizer_config.json")
    if config.tie_embeddings:
        weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    weights = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    save_torch_state_dict(weights, temporary, max_shard_size=MAX_SHARD_SIZE)
    for file in temporary.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable to their owner alone

    if out.exists():
        out.rmdir()
    temporary.rename(out)


def _name_tokenizer_for_all_versions(path: Path) -> None:
    """transformers 5 writes a class name that 4 does not know, and reads the old one."""
    if path.is_file():
        values = json.loads(path.read_text())
        if values.get("tokenizer_class") == "TokenizersBackend":
            _write_json(path, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})


def without_padding(
    weights: dict[str, Tensor], config: ModelConfig, vocab_size: int
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights and configuration without the rows above a tokenizer's `vocab_size`, which stand for no text: whoever
    samples from an export cannot draw them, and its vocabulary is the tokenizer's."""
    rows = {name: weights[name][:vocab_size] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return {**weights, **rows}, config.model_copy(update={"vocab_size": min(config.vocab_size or 0, vocab_size)})


def check_new(out: Path) -> None:
    """Refuse to write a folder over something: `out` must not exist, or be an empty folder.

    Raises:
        UserError: it is neither.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name a new folder, or remove it first")


def load_model(folder: str | Path, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
    """The model of an exported folder, or of a Hugging Face folder that `read_folder` knows.

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

    The weights are exactly those of a model of this configuration, in name and shape: a weight that has no place and a
    place that gets no weight are errors, here already.

    Raises:
        UserError: the folder holds no model that we know, or not all of one.
    """
    folder = Path(folder)
    config = model_config(_read_config(folder), folder)
    places = _find_weights(folder)
    if any(name.endswith(AUTHORS_CHUNK_QUERY) for name in places):
        config = _with_authors_routing(config, set(places), folder)
    shapes = {_our_name(name): shape for name, (_, shape) in places.items()}
    if config.tie_embeddings:
        shapes["lm_head.weight"] = shapes.get("model.embed_tokens.weight", [])
    _check_shapes(folder, shapes, config)
    return config, lambda: _read_weights(folder, config, places)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here; expected an exported folder or a Hugging Face model folder")
    try:
        values = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}/config.json: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder}/config.json: expected the fields of a model, found {type(values).__name__}")
    return values


def eos_ids(folder: str | Path) -> set[int]:
    """The tokens that end a text, by a Hugging Face folder's generation_config.json or else its config.json."""
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            return {eos} if isinstance(eos, int) else set(eos)
    return set()


def _find_weights(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """The file and the shape of every weight by its name in the folder, without buffers that old files hold."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model*.safetensors here; expected the weights in the safetensors format")
    places = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
        except FileNotFoundError as error:
            raise UserError(f"{file}: not here, though {index.name} names it") from error
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error
        places.update({name: (file, shape) for name, shape in shapes.items() if not name.endswith(OLD_BUFFERS)})
    return places


def _read_weights(folder: Path, config: ModelConfig, places: dict[str, tuple[Path, list[int]]]) -> dict[str, Tensor]:
    """All weights on the CPU, in the files' own type; those that are tied, twice."""
    from safetensors.torch import load_file

    files = sorted({file for file, _ in places.values()})
    found = {name: weight for file in files for name, weight in load_file(file).items() if name in places}
    weights = {_our_name(name): weight for name, weight in found.items()}
    for name in weights:
        if name.endswith("chunk_query"):
            weights[name] = weights[name].view(config.kv_heads, config.head_dim)  # the authors' are flat
        if weights[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{folder}: {name} is {weights[name].dtype}; expected float32, bfloat16 or float16")
    if config.tie_embeddings:
        embedding = weights["model.embed_tokens.weight"]
        if "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"], embedding):
            raise UserError(f"{folder}: lm_head.weight is not the embedding, though config.json ties them")
        weights["lm_head.weight"] = embedding
    return weights


def _our_name(name: str) -> str:
    return name.replace(AUTHORS_CHUNK_QUERY, "self_attn.chunk_query")


def _with_authors_routing(config: ModelConfig, names: set[str], folder: Path) -> ModelConfig:
    """The configuration with DashAttention, as the authors' fields in config.json say, where there is an indexer."""
    values = _read_config(folder)
    missing = [name for name in AUTHORS_FIELDS if name not in values]
    if missing:
        raise UserError(
            f"{folder}/config.json: no {', '.join(missing)}, which the weights {AUTHORS_CHUNK_QUERY} need: the "
            f"authors' DashAttention is told by {', '.join(AUTHORS_FIELDS)}"
        )
    layers = [f"model.layers.{layer}.{AUTHORS_CHUNK_QUERY}" in names for layer in range(config.layers)]
    attention = {
        "type": ["dash" if routed else "full" for routed in layers],
        "chunk_size": values["chunk_size"],
        "prior_normalizer": "geometric_mean" if values["estimate_diagonal"] else "none",
        "prior_temperature": values["sigma"],
        "routing_scale": values["scaling_factor"],
    }
    try:
        return ModelConfig.model_validate({**config.model_dump(), "attention": attention})
    except ValidationError as error:
        raise _invalid(error, folder) from error


def _invalid(error: ValidationError, folder: Path) -> UserError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return UserError(f"{folder}/config.json: {where}: {first['msg'].removeprefix('Value error, ')}")


def _check_shapes(folder: Path, found: dict[str, list[int]], config: ModelConfig) -> None:
    """Names and shapes are those of a model of this configuration."""
    with torch.device("meta"):
        expected = {name: list(weight.shape) for name, weight in LanguageModel(config).state_dict().items()}
    _check_names(folder, set(found), set(expected))
    for name, shape in found.items():
        if shape != expected[name] and not (
            name.endswith("chunk_query") and math.prod(shape) == math.prod(expected[name])
        ):
            raise UserError(f"{folder}: {name} has shape {shape}, by config.json it should be {expected[name]}")


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
        model = config.model_dump(mode="json")
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["DashForCausalLM"],
            "auto_map": AUTO_MAP,
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
        UserError: it asks for something that our models cannot do, or lacks something.
    """
    try:
        if values["model_type"] == MODEL_TYPE:
            return dash_config(values)
        _check_supported(values, folder)
        return _llama_config(values, folder)
    except KeyError as error:
        raise UserError(f"{folder}/config.json: no {error.args[0]}, which every model needs") from error
    except ValidationError as error:
        raise _invalid(error, folder) from error


def dash_config(values: dict[str, Any]) -> ModelConfig:
    """The configuration of an exported Dash model. transformers may have changed what it knows under its own names:
    more tokens, weights that are no longer tied."""
    changed = {"vocab_size": values["vocab_size"], "tie_embeddings": values["tie_word_embeddings"]}
    return ModelConfig.model_validate({**values["model"], **changed})


def _check_supported(values: dict[str, Any], folder: Path) -> None:
    if values["model_type"] not in MODEL_TYPES:
        raise UserError(
            f"{folder}: model_type {values['model_type']!r} is not supported; expected {', '.join(MODEL_TYPES)} "
            f"or {MODEL_TYPE}"
        )
    switches = ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config")
    unsupported = [name for name in switches if values.get(name)]
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        unsupported.append(f"hidden_act {values['hidden_act']}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        unsupported.append(f"partial_rotary_factor {values['partial_rotary_factor']}")
    if other := set(values.get("layer_types") or []) - {"full_attention"}:
        unsupported.append(f"layer_types {', '.join(sorted(other))}")
    window = values.get("sliding_window") if values["model_type"] == "mistral" else None
    if window is not None and window < values["max_position_embeddings"]:
        unsupported.append(f"sliding_window {window}, shorter than max_position_embeddings")
    if unsupported:
        raise UserError(f"{folder}/config.json: {', '.join(unsupported)}: not supported by our models")


def _llama_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    # Configurations written by transformers 5 keep both in rope_parameters.
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    heads = values["num_attention_heads"]
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
    options = ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", *options}
    if kind not in ("default", "linear", "yarn", "llama3") or set(rope) - known:
        raise UserError(
            f"{folder}/config.json: rope_scaling {rope} is not supported; expected default, linear, yarn or "
            f"llama3 with {', '.join(sorted(known))}"
        )
    if kind == "default":
        return None
    original_seq = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    given = {name: rope[name] for name in options if name in rope}
    return RopeScaling(type=kind, factor=rope["factor"], original_seq=original_seq, **given)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
