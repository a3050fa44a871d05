"""The weights of a Hugging Face folder: found, checked against a model's, read. Only safetensors files are opened."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

CHUNK_QUERY = "self_attn.chunk_query"
AUTHORS_CHUNK_QUERY = "self_attn.indexer_q"  # the same, flat, in the checkpoints of DashAttention's authors
OLD_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # computed, not learned; once saved along
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Place(NamedTuple):
    """Where a weight is, and its shape there."""

    file: Path
    shape: list[int]


def find_weights(folder: Path) -> dict[str, Place]:
    """Every weight by its name in the folder, without buffers that old files hold.

    Raises:
        UserError: a file is missing or broken, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    listed = _read_index(index) if index.is_file() and not whole.is_file() else {}
    files = [whole] if whole.is_file() else sorted({folder / file for file in listed.values()})
    if not files:
        instead = ""
        if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
            instead = f"; {pickles[0]} is not read, since it could run code: load and save it by transformers"
        raise UserError(
            f"{folder}: no model.safetensors here, and no {index.name}; expected the weights in the safetensors format"
            f"{instead}"
        )
    places = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
        except FileNotFoundError as error:
            raise UserError(f"{file}: not here, though {index.name} names it") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error
        places.update({name: Place(file, shape) for name, shape in shapes.items() if not name.endswith(OLD_BUFFERS)})
    for name, shard in listed.items():
        if name not in places and not name.endswith(OLD_BUFFERS):
            raise UserError(f"{folder / shard}: holds no {name}, though {index.name} says so")
    return places


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text())["weight_map"]
        if listed and all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            return dict(listed)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f'{index}: expected {{"weight_map": {{weight: file of this folder}}}}')


def our_name(name: str) -> str:
    """A weight's name in our state dicts."""
    return name.replace(AUTHORS_CHUNK_QUERY, CHUNK_QUERY)


def authors_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by state-dict name as the authors name and shape them."""
    flat = {name: weight.flatten() if name.endswith(CHUNK_QUERY) else weight for name, weight in weights.items()}
    return {name.replace(CHUNK_QUERY, AUTHORS_CHUNK_QUERY): weight for name, weight in flat.items()}


def check_weights(folder: Path, places: dict[str, Place], config: ModelConfig) -> None:
    """The weights are those of a model of this configuration, in name and shape.

    Raises:
        UserError: they are not; it names the first that has no place, is missing or has another shape.
    """
    found = {our_name(name): place.shape for name, place in places.items()}
    if config.tie_embeddings:
        found[HEAD] = found.get(EMBEDDING, [])
    with torch.device("meta"):
        expected = {name: list(weight.shape) for name, weight in LanguageModel(config).state_dict().items()}
    check_names(folder, set(found), set(expected))
    for name, shape in found.items():
        flat = name.endswith(CHUNK_QUERY) and math.prod(shape) == math.prod(expected[name])
        if shape != expected[name] and not flat:
            raise UserError(f"{folder}: {name} has shape {shape}, by config.json it should be {expected[name]}")


def check_names(origin: str | Path, found: set[str], expected: set[str]) -> None:
    """Every weight has a place and every place gets a weight.

    Raises:
        UserError: it names the first of each kind that has not.
    """
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise UserError(
            f"{origin}: the weights do not fit config.json: "
            f"{len(missing)} missing (first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})"
        )


def read_weights(folder: Path, config: ModelConfig, places: dict[str, Place]) -> dict[str, Tensor]:
    """All weights on the CPU, by our names, in the files' own type; those that are tied, twice.

    Raises:
        UserError: one has a type that is none of a weight, or tied ones differ.
    """
    from safetensors.torch import load_file

    files = sorted({place.file for place in places.values()})
    found = {name: weight for file in files for name, weight in load_file(file).items() if name in places}
    weights = {our_name(name): weight for name, weight in found.items()}
    for name in weights:
        if name.endswith(CHUNK_QUERY):
            weights[name] = weights[name].view(config.kv_heads, config.head_dim)  # the authors' are flat
        if weights[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{folder}: {name} is {weights[name].dtype}; expected float32, bfloat16 or float16")
    if config.tie_embeddings:
        embedding = weights[EMBEDDING]
        if HEAD in weights and not torch.equal(weights[HEAD], embedding):
            raise UserError(f"{folder}: lm_head.weight is not the embedding, though config.json ties them")
        weights[HEAD] = embedding
    return weights
