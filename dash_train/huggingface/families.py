"""What a config.json means: the architectures of transformers that our models can be, and ours, with DashAttention."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dash_train.errors import UserError
from dash_train.model.config import ModelConfig, RopeScaling
from dash_train.model.rotary import rotary_frequencies

logger = logging.getLogger(__name__)

MODEL_TYPE = "dash_train"
# Of transformers' architectures those that are ours in all that their configurations can say. MiniCPM (which comes
# with code of its own) and Granite say the same with different words.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
}
THEIR_NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
TIED_BY_DEFAULT = ("smollm3", "minicpm")
UNSUPPORTED = (  # switches that our models lack
    "mlp_bias",
    "quantization_config",
    "sparse_config",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# How the authors' DashAttention checkpoints say in config.json how they route.
AUTHORS_FIELDS = ("chunk_size", "estimate_diagonal", "sigma", "scaling_factor")
AUTHORS_PRIORS = {True: "geometric_mean", False: "none"}  # by their estimate_diagonal
# A Dash model's routing in config.json; the first three are lists with one value a layer.
ROUTING_FIELDS = ("routing_block", "routing_window", "routing_scale", "prior_normalizer", "prior_temperature")
ROPE_OPTIONS = {  # what each type of RoPE scaling may say, beside its factor and original length
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}


def huggingface_config(config: ModelConfig, max_seq: int) -> dict[str, Any]:
    """The config.json of a model, without the tokenizer's part; `max_seq` is the longest context it was trained on.

    Of an architecture of transformers wherever one says all of it, else our own (`DashForCausalLM`).
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        max_seq = scaling.original_seq  # from which transformers takes it
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
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_values(scaling) if scaling else None,
    }
    if scaling is not None and scaling.type == "longrope":
        values["original_max_position_embeddings"] = scaling.original_seq  # where transformers 4 looks for it
    family = _family(config)
    if family == MODEL_TYPE:
        return {"model_type": family, "architectures": ["DashForCausalLM"], **values, **_own_values(config)}
    values = {"model_type": family, "architectures": [ARCHITECTURES[family]], **values, "attention_bias": False}
    if family == "smollm3":
        values["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in range(config.layers)]
    if family == "granite":
        values |= {
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logits_scale,
            "attention_multiplier": config.head_dim**-0.5,
        }
    return values


def _family(config: ModelConfig) -> str:
    """The simplest architecture that says all of a configuration."""
    if any(config.attention_type(layer) == "dash" for layer in range(config.layers)):
        return MODEL_TYPE
    special = {
        "qwen3": config.qk_norm,
        "qwen2": config.qkv_bias,
        "smollm3": bool(config.nope_layers),
        "granite": (config.embedding_scale, config.residual_scale, config.logits_scale) != (1, 1, 1),
    }
    needed = [family for family, needs in special.items() if needs] or ["llama"]
    return needed[0] if len(needed) == 1 else MODEL_TYPE


def _own_values(config: ModelConfig) -> dict[str, Any]:
    """What only our own architecture says. Routing by layer, whether all are the same or not."""
    layers = range(config.layers)
    return {
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "nope_layers": config.nope_layers,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logits_scale": config.logits_scale,
        "attention_types": [config.attention_type(layer) for layer in layers],
        "chunk_size": config.attention.chunk_size,
        "routing_block": [config.routing_block(layer) for layer in layers],
        "routing_window": [config.routing_window(layer) for layer in layers],
        "routing_scale": [config.routing_scale(layer) for layer in layers],
        "prior_normalizer": config.attention.prior_normalizer,
        "prior_temperature": config.attention.prior_temperature,
    }


def authors_config(config: ModelConfig, max_seq: int) -> dict[str, Any]:
    """The config.json of a Dash model as the DashAttention paper's authors write it: its base and AUTHORS_FIELDS.

    Raises:
        UserError: it has what theirs have not.
    """
    attention = config.attention
    dash = [layer for layer in range(config.layers) if config.attention_type(layer) == "dash"]
    scales = {config.routing_scale(layer) for layer in dash}
    problems = {
        "no Dash layer": not dash,
        "routing_block or routing_window above 1": any(
            max(config.routing_block(layer), config.routing_window(layer)) > 1 for layer in dash
        ),
        f"a routing_scale for each layer ({', '.join(f'{scale:g}' for scale in sorted(scales))})": len(scales) > 1,
        f"prior_normalizer {attention.prior_normalizer}": attention.prior_normalizer not in AUTHORS_PRIORS.values(),
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise UserError(f"--format authors: the model has {', '.join(found)}, which their format cannot say")
    base = config.model_copy(update={"attention": attention.model_copy(update={"type": "full"})})
    return {
        **huggingface_config(base, max_seq),
        "chunk_size": attention.chunk_size,
        "estimate_diagonal": attention.prior_normalizer == AUTHORS_PRIORS[True],
        "sigma": attention.prior_temperature,
        "scaling_factor": scales.pop(),
    }


def model_config(values: dict[str, Any], folder: Path, seq: int | None = None) -> ModelConfig:
    """The configuration that a config.json means; `folder` is named in errors.

    `seq` is the tokens of the longest row that the model will see (None: as many as its config.json allows): a sliding
    window that is not shorter makes no difference.

    Raises:
        UserError: it asks for something that our models cannot do, or lacks something.
    """
    try:
        if values["model_type"] == MODEL_TYPE:
            return _own_config(values, folder)
        _check_supported(values, folder, seq)
        return _foreign_config(values, folder)
    except KeyError as error:
        raise UserError(f"{folder}/config.json: no {error.args[0]}, which every such model needs") from error
    except ValidationError as error:
        raise _invalid(error, folder) from error
    except TypeError as error:
        raise UserError(f"{folder}/config.json: a value of a type that none of its fields has ({error})") from error


def shape_of(config: Any) -> ModelConfig:
    """Our configuration of a `DashConfig`. One from before there were plain fields (`model`) gets them."""
    shape = _own_config(config.to_dict(), Path(config._name_or_path or "."))
    if getattr(config, "model", None):
        for name, value in huggingface_config(shape, config.max_position_embeddings).items():
            setattr(config, name, value)
        config.model = None
    return shape


def _own_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    if values.get("model"):  # how it was said until version 0.2
        changed = {"vocab_size": values["vocab_size"], "tie_embeddings": values["tie_word_embeddings"]}
        return ModelConfig.model_validate({**values["model"], **changed})
    same = ("qk_norm", "qkv_bias", "nope_layers", "embedding_scale", "residual_scale", "logits_scale")
    attention = {name: values[name] for name in ("chunk_size", *ROUTING_FIELDS)}
    attention["type"] = values["attention_types"]
    for name in ("type", "routing_block", "routing_window"):  # one value, where all layers have it
        if len(set(attention[name])) == 1:
            attention[name] = attention[name][0]
    return _base_config(
        values,
        folder,
        attention=attention,
        **{name: values[name] for name in same},
    )


def _foreign_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    kind = values["model_type"]
    options: dict[str, Any] = {"qk_norm": kind == "qwen3", "qkv_bias": kind == "qwen2"}
    if kind == "smollm3":
        options["nope_layers"] = [layer for layer, has_rope in enumerate(_has_rope(values)) if not has_rope]
    if kind == "minicpm":
        options["embedding_scale"] = values["scale_emb"]
        options["residual_scale"] = values["scale_depth"] / math.sqrt(values["num_hidden_layers"])
        options["logits_scale"] = values["dim_model_base"] / values["hidden_size"]
    if kind == "granite":
        options["embedding_scale"] = values["embedding_multiplier"]
        options["residual_scale"] = values["residual_multiplier"]
        options["logits_scale"] = 1 / values["logits_scaling"]
    return _base_config(values, folder, attention={"type": "full"}, **options)


def _base_config(values: dict[str, Any], folder: Path, **options: Any) -> ModelConfig:
    # Configurations written by transformers 5 keep both in rope_parameters.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{folder}/config.json: rope_scaling {rope!r} is not supported; expected an object or null")
    heads = values["num_attention_heads"]
    kind = values["model_type"]
    return ModelConfig(
        layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        mlp_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tie_embeddings=values.get("tie_word_embeddings", kind in TIED_BY_DEFAULT),
        norm_eps=values["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or values.get("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(dict(rope), values, folder),
        init_std=values.get("initializer_range", 0.02),
        **options,
    )


def with_authors_routing(config: ModelConfig, values: dict[str, Any], dash: list[bool], folder: Path) -> ModelConfig:
    """The configuration with DashAttention in the layers that `dash` says, as the authors' fields in config.json say.

    Raises:
        UserError: one of them is missing, or has a value that is none.
    """
    missing = [name for name in AUTHORS_FIELDS if name not in values]
    if missing:
        raise UserError(
            f"{folder}/config.json: no {', '.join(missing)}, which the weights self_attn.indexer_q need: the authors' "
            f"DashAttention is told by {', '.join(AUTHORS_FIELDS)}"
        )
    attention = {
        "type": "dash" if all(dash) else ["dash" if routed else "full" for routed in dash],
        "chunk_size": values["chunk_size"],
        "prior_normalizer": AUTHORS_PRIORS[bool(values["estimate_diagonal"])],
        "prior_temperature": values["sigma"],
        "routing_scale": values["scaling_factor"],
    }
    try:
        return ModelConfig.model_validate({**config.model_dump(), "attention": attention})
    except ValidationError as error:
        raise _invalid(error, folder) from error


def _invalid(error: ValidationError, folder: Path) -> UserError:
    first = error.errors()[0]
    where = ".".join(THEIR_NAMES.get(str(name), str(name)) for name in first["loc"])
    return UserError(f"{folder}/config.json: {where}: {first['msg'].removeprefix('Value error, ')}")


def _check_supported(values: dict[str, Any], folder: Path, seq: int | None) -> None:
    kind = values["model_type"]
    if kind not in ARCHITECTURES:
        expected = ", ".join((*ARCHITECTURES, MODEL_TYPE))
        raise UserError(f"{folder}: model_type {kind!r} is not supported; expected one of {expected}")
    unsupported = [name for name in UNSUPPORTED if values.get(name)]
    if values.get("attention_bias") and kind != "qwen2":
        unsupported.append("attention_bias")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        unsupported.append(f"hidden_act {values['hidden_act']}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        unsupported.append(f"partial_rotary_factor {values['partial_rotary_factor']}")
    if other := set(values.get("layer_types") or []) - {"full_attention", "sliding_attention"}:
        unsupported.append(f"layer_types {', '.join(sorted(other))}")
    if kind == "granite":
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        if not math.isclose(values["attention_multiplier"], head_dim**-0.5, rel_tol=1e-6):
            unsupported.append(f"attention_multiplier {values['attention_multiplier']}, not 1 / sqrt(head_dim)")
    unsupported += _narrow_window(values, folder, seq)
    if unsupported:
        raise UserError(f"{folder}/config.json: {', '.join(unsupported)}: not supported by our models")


def _narrow_window(values: dict[str, Any], folder: Path, seq: int | None) -> list[str]:
    """What to say of a sliding window that hides something from rows of `seq` tokens."""
    slides = values["model_type"] == "mistral" or values.get("use_sliding_window")
    types = values.get("layer_types") or (["sliding_attention"] if slides else [])
    window = values.get("sliding_window")
    if "sliding_attention" not in types or (window is None and slides):
        return []
    if window is None:
        return ["layer_types sliding_attention"]
    longest, of = (values["max_position_embeddings"], "max_position_embeddings") if seq is None else (seq, "rows of")
    if window < longest:
        return [f"sliding_window {window}, shorter than {of} {longest}"]
    if window < values["max_position_embeddings"]:
        logger.info("%s: its sliding window of %d tokens hides nothing from rows of %d", folder, window, longest)
    return []


def _has_rope(values: dict[str, Any]) -> list[int]:
    layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    listed = values.get("no_rope_layers")
    if listed is None:
        return [int((layer + 1) % interval != 0) for layer in range(layers)]
    return list(listed[:layers])


def _rope_values(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` entry of a config.json."""
    values: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "dynamic":
        values["original_max_position_embeddings"] = scaling.original_seq
    options = {name: getattr(scaling, name, None) for name in ROPE_OPTIONS[scaling.type]}
    if scaling.type == "longrope":  # else transformers 4 makes one from max_position_embeddings
        _, options["attention_factor"] = rotary_frequencies(2 * len(scaling.short_factor or ()), 1e4, scaling)
    if scaling.type == "yarn" and scaling.truncate:
        del options["truncate"]  # which older versions of transformers do not know
    return {**values, **{name: value for name, value in options.items() if value is not None}}


def _rope_scaling(rope: dict[str, Any], values: dict[str, Any], folder: Path) -> RopeScaling | None:
    """The inverse of `_rope_values`; `rope` is what config.json says of RoPE."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.pop("partial_rotary_factor", 1.0)
    common = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
    known = {*common, *ROPE_OPTIONS.get(kind, ())}
    if partial != 1.0 or kind not in ("default", *ROPE_OPTIONS) or set(rope) - known:
        raise UserError(
            f"{folder}/config.json: rope_scaling {rope} is not supported; expected default, "
            f"{', '.join(ROPE_OPTIONS)} as transformers describes them, for all of a head"
        )
    if kind == "default":
        return None
    longest = values["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or longest
    options = {name: rope[name] for name in ROPE_OPTIONS[kind] if rope.get(name) is not None}
    factor = rope.get("factor") or longest / original
    scales = options.pop("mscale", None), options.pop("mscale_all_dim", None)
    if all(scales) and "attention_factor" not in options:
        numerator, denominator = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        options["attention_factor"] = numerator / denominator
    return RopeScaling(type=kind, factor=factor, original_seq=longest if kind == "dynamic" else original, **options)
