"""Models as Hugging Face folders: written by `export`, read back by `load_model` and `read_folder`.

A model that is one of transformers' architectures is exported as that, and needs nothing of ours; all others, above all
those with Dash layers, as `DashForCausalLM`, with a modelling file that needs nothing of ours either (generated.py).
families.py says which folders can be read.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.huggingface.config import AUTO_MAP, MODELING_FILE
from dash_train.huggingface.families import (
    MODEL_TYPE,
    authors_config,
    huggingface_config,
    model_config,
    with_authors_routing,
)
from dash_train.huggingface.generated import modeling_code
from dash_train.huggingface.weights import (
    AUTHORS_CHUNK_QUERY,
    EMBEDDING,
    HEAD,
    authors_weights,
    check_names,
    check_weights,
    find_weights,
    read_weights,
)
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

MAX_SHARD_SIZE = "5GB"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
Format = Literal["transformers", "authors"]


def export(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    out: str | Path,
    *,
    max_seq: int,
    dtype: torch.dtype | None,
    card: str,
    generation: dict[str, Any] | None = None,
    layout: Format = "transformers",
) -> None:
    """Write a folder that transformers loads, complete or not at all.

    Args:
        weights: by state-dict name.
        config: the weights' model; its routing scales must be numbers.
        tokenizer: written in Hugging Face's format; None writes none.
        out: the folder, new or empty.
        max_seq: the longest context the model was trained on, in tokens (`max_position_embeddings`).
        dtype: of the written weights; None leaves each as it is.
        card: README.md, in Markdown.
        generation: what generation_config.json shall say besides the tokenizer's tokens and what the tokenizer brought
            along from the model that it was made for.
        layout: `authors` writes a Dash model as the authors of DashAttention do, for their code.

    Raises:
        UserError: `out` already holds something, or the authors' format cannot say what the model is.
    """
    from huggingface_hub import save_torch_state_dict

    out = Path(out)
    check_new(out)
    values = (authors_config if layout == "authors" else huggingface_config)(config, max_seq)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    (temporary / "README.md").write_text(card)
    generation = dict(generation or {})
    if tokenizer is not None:
        tokenizer.save_huggingface(temporary)
        generation |= read_generation_config(temporary) | _special_tokens(tokenizer, read_eos_ids(temporary))
    if generation:
        _write_json(temporary / "generation_config.json", generation)
    if values["model_type"] == MODEL_TYPE:
        values["auto_map"] = AUTO_MAP
        (temporary / f"{MODELING_FILE}.py").write_text(modeling_code())
    tokens = {name: generation.get(name) for name in SPECIAL_TOKENS}  # null, where a class has a default
    written = dtype or weights[EMBEDDING].dtype
    _write_json(temporary / "config.json", {**values, **tokens, "dtype": str(written).removeprefix("torch.")})
    if config.tie_embeddings:
        weights = {name: weight for name, weight in weights.items() if name != HEAD}
    if layout == "authors":
        weights = authors_weights(weights)
    weights = {name: weight.to(dtype or weight.dtype).contiguous() for name, weight in weights.items()}
    save_torch_state_dict(weights, temporary, max_shard_size=MAX_SHARD_SIZE)
    for file in temporary.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable to their owner alone

    if out.exists():
        out.rmdir()
    temporary.rename(out)


def _special_tokens(tokenizer: Tokenizer, more_eos: tuple[int, ...]) -> dict[str, Any]:
    """A tokenizer's special tokens as transformers names them. Several may end a text, the tokenizer's own first."""
    ends = list(dict.fromkeys((tokenizer.eos_id, *more_eos)))
    eos = ends if len(ends) > 1 else ends[0]
    return dict(zip(SPECIAL_TOKENS, (tokenizer.bos_id, eos, tokenizer.pad_id), strict=True))


def without_padding(
    weights: dict[str, Tensor], config: ModelConfig, vocab_size: int
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights and configuration without the rows above a tokenizer's `vocab_size`, which stand for no text: whoever
    samples from an export cannot draw them, and its vocabulary is the tokenizer's."""
    rows = {name: weights[name][:vocab_size].clone() for name in (EMBEDDING, HEAD)}  # safetensors writes no views
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
    config, load = read_folder(folder)
    return assemble(config, load(), dtype, device, folder)


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
    check_names(origin, set(weights), set(model.state_dict()))
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def read_folder(folder: str | Path, seq: int | None = None) -> tuple[ModelConfig, Callable[[], dict[str, Tensor]]]:
    """The configuration of a Hugging Face folder, and a function that reads its weights by state-dict name.

    The weights are exactly those of a model of this configuration, in name and shape: a weight that has no place and a
    place that gets no weight are errors, here already. `seq` as in `model_config`.

    Raises:
        UserError: the folder holds no model that we know, or not all of one.
    """
    folder = Path(folder)
    values = read_config(folder)
    config = model_config(values, folder, seq)
    places = find_weights(folder)
    routed = [f"model.layers.{layer}.{AUTHORS_CHUNK_QUERY}" in places for layer in range(config.layers)]
    if any(routed):
        config = with_authors_routing(config, values, routed, folder)
    check_weights(folder, places, config)
    return config, lambda: read_weights(folder, config, places)


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json here; expected an exported folder or a Hugging Face model folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON object in a file.

    Raises:
        UserError: it holds none.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with fields, found {type(values).__name__}")
    return values


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """What a folder's generation_config.json says; without one, the special tokens that its config.json names.

    Raises:
        UserError: it is no JSON object.
    """
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        if path.is_file():
            values = read_json(path)
            names = SPECIAL_TOKENS if file == "config.json" else values
            return {name: values[name] for name in names if values.get(name) is not None}
    return {}


def read_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text, by `read_generation_config`."""
    eos = read_generation_config(folder).get("eos_token_id")
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
