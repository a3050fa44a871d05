"""The weights a run starts from: random, or those of another run or of an exported folder (`init.from`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dash_train.errors import UserError
from dash_train.model.config import ModelConfig
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import Recipe
from dash_train.recipe.values import merge
from dash_train.training import checkpoint

VOCAB_MULTIPLE = 64
GROWS = ("model.embed_tokens.weight", "lm_head.weight")  # with the vocabulary
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of the weights, by train.precision


@dataclass(frozen=True)
class Source:
    """Existing weights, with the model and the tokenizer they belong to."""

    config: ModelConfig
    tokenizer: Path
    load: Callable[[], dict[str, Tensor]]
    """Reads the weights, on the CPU and in the type they were saved in, by state-dict name."""
    checkpoint: Path | None = None
    """The checkpoint of a run that they are; None for an exported folder."""


def open_source(path: str | Path, named_by: str = "init.from: ", seq: int | None = None) -> Source:
    """Open a run folder, one of its checkpoints, or an exported (Hugging Face) folder; `named_by` begins the error.

    `seq` is the tokens of the longest row that the model will see, None: as many as it was trained on.

    Raises:
        UserError: it is none of these.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir() or (path / checkpoint.MANIFEST).is_file():
        found = checkpoint.find(path)
        config, tokenizer = checkpoint.load_model_config(found), tokenizer_of(found)
        return Source(config, tokenizer, lambda: checkpoint.load_weights(found), found)
    if (path / "config.json").is_file():
        from dash_train.huggingface.conversion import read_folder

        config, load = read_folder(path, seq)
        return Source(config, path, load)
    raise UserError(f"{named_by}{path}: expected a run folder, a checkpoint or an exported folder, found none of them")


def tokenizer_of(found: Path) -> Path:
    """The folder of the tokenizer that belongs to a checkpoint: its run's, or one beside its files.

    Raises:
        UserError: there is none.
    """
    places = (found.absolute().parent.parent / "tokenizer", found / "tokenizer")
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{found}: no tokenizer in {places[0]} or {places[1]}; a checkpoint that was taken out of its run needs a copy "
        "of the run's tokenizer folder beside its files"
    )


def resolve_model(recipe: Recipe, source: Source | None, vocab_size: int) -> Recipe:
    """The recipe with its model section settled: the source's, but for what the recipe sets itself; the vocabulary is
    the tokenizer's, and grows where that has got a chat template. Layers that change their attention type get a new
    routing scale.

    Raises:
        UserError: the section contradicts itself, the rest of the recipe or the tokenizer.
    """
    own = recipe.model.model_dump(exclude_unset=source is not None)
    values = source.config.model_dump() if source else {}
    types_before = _types_of(values) if source else []
    if "type" in (own.get("rope_scaling") or {}):
        values["rope_scaling"] = None  # another kind has no use for what belongs to the source's
    merge(values, own)
    if source and _types_of(values) != types_before and "routing_scale" not in own.get("attention", {}):
        values["attention"]["routing_scale"] = "auto"
    if values["vocab_size"] is None:
        values["vocab_size"] = _whole_multiple(vocab_size)
    has_chats = any(text.supervised for text in recipe.data.sources)
    if values["vocab_size"] < vocab_size and source is not None and "vocab_size" not in own and has_chats:
        values["vocab_size"] = _whole_multiple(vocab_size)  # a chat template has brought tokens
    if values["vocab_size"] < vocab_size:
        sizes = f"({values['vocab_size']}) is smaller than the tokenizer's ({vocab_size})"
        if source is None or "vocab_size" in own:
            raise UserError(f"model.vocab_size {sizes}; leave it out")
        raise UserError(
            f"init.from: {recipe.init.from_}: vocab_size {sizes}; take the added tokens out of the tokenizer, or give "
            f"the model rows for them (transformers: resize_token_embeddings({vocab_size}), then save_pretrained)"
        )
    try:
        return Recipe.model_validate({**recipe.model_dump(by_alias=True), "model": values})
    except ValidationError as error:
        first = error.errors()[0]
        origin = f" (with what comes from {recipe.init.from_})" if source else ""
        raise UserError(f"model{origin}: {first['msg'].removeprefix('Value error, ')}") from error


def build_model(
    recipe: Recipe,
    load: Callable[[], dict[str, Tensor]] | None,
    deepspeed_config: dict[str, Any],
    device: torch.device,
    context: Context = WHOLE_ROWS,
) -> LanguageModel:
    """The model with its initial weights, drawn from `train.seed` or read by `load`; `context` is the ranks that share
    its rows.

    Weights are drawn on `device` and in the precision of training, as zero.Init does: the same ones at every ZeRO
    stage, within seconds, and never in more memory than the model will take. Under ZeRO-3 each weight is partitioned
    as soon as it exists, so that no rank ever holds the whole model.

    Raises:
        UserError: the weights do not fit the model.
    """
    import deepspeed

    torch.manual_seed(recipe.train.seed)
    partitioned = recipe.parallel.zero_stage == 3
    placed = deepspeed.zero.Init(config_dict_or_path=deepspeed_config) if partitioned else device
    with placed, _default_dtype(DTYPES[recipe.train.precision]):
        model = LanguageModel(
            recipe.model.model_copy(deep=True),
            activation_checkpointing=recipe.train.activation_checkpointing,
            activation_offload=recipe.train.activation_offload,
            context=context,
        )
    if load is not None:
        copy_weights(model, load(), str(recipe.init.from_))
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def copy_weights(model: LanguageModel, weights: dict[str, Tensor], origin: str) -> None:
    """Put weights into a model of the recipe's shape, also one that ZeRO-3 has partitioned; `origin` names them.

    Raises:
        UserError: a weight has no place, a place no weight, or the shapes differ.
    """
    import deepspeed

    places = dict(model.named_parameters())
    for name in weights:
        # Tied weights have one place; where a recipe asks for full attention, there is nothing to summarize for.
        if name not in places and name != "lm_head.weight" and not name.endswith("chunk_query"):
            raise UserError(
                f"init.from: {origin} holds {name}, for which the recipe's model has no place; leave the model section "
                "out to take over its shape"
            )
    for name, parameter in places.items():
        # Full-attention weights that become Dash have no chunk query: it stays zero, a summary the mean key.
        if name not in weights and name.endswith("chunk_query"):
            continue
        if name not in weights:
            raise UserError(f"init.from: {origin} holds no {name}; is it a Llama-style model of this shape?")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            weight = _grown(weights[name], len(parameter)) if name in GROWS else weights[name]
            if parameter.shape != weight.shape:
                raise UserError(
                    f"init.from: {name} has shape {list(weights[name].shape)} in {origin}, the recipe's model needs "
                    f"{list(parameter.shape)}; leave the model section out to take over its shape"
                )
            parameter.copy_(weight)


def _grown(weight: Tensor, rows: int) -> Tensor:
    """A weight with at least so many rows; new ones are the mean of the old, the likeliest guess for a new token."""
    more = max(0, rows - len(weight))
    return (
        torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(more, -1)]) if more else weight
    )


def _types_of(model: dict[str, Any]) -> list[str]:
    """The attention type of every layer, of the values of a ModelConfig."""
    types = model["attention"]["type"]
    return list(types) if isinstance(types, list) else [types] * model["layers"]


def _whole_multiple(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
