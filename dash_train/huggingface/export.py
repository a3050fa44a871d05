"""A run's checkpoint, or a folder of another model, as a Hugging Face folder with a model card."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from dash_train.data.tokenizer import Tokenizer, load_tokenizer
from dash_train.errors import UserError
from dash_train.huggingface.conversion import (
    Format,
    check_new,
    export,
    read_config,
    read_folder,
    read_generation_config,
    without_padding,
)
from dash_train.model.config import ModelConfig
from dash_train.tracking.metrics import FILE, read_metrics
from dash_train.training import checkpoint
from dash_train.training.checkpoint import TrainState
from dash_train.training.initial import DTYPES, open_source

logger = logging.getLogger(__name__)


def export_run(run: str | Path, out: str | Path, step: int | None = None, layout: Format = "transformers") -> Path:
    """Export the checkpoint of `step` (default: the newest) of a run folder, or an exported folder once more.

    The weights are written in the precision they were trained in: bfloat16, or float32 with `train.precision: fp32`.
    Returns the checkpoint's folder, or the exported one.

    Raises:
        UserError: there is no such checkpoint, `out` already holds something, or the format cannot say what it is.
    """
    out = Path(out).absolute()
    check_new(out)  # before the weights are gathered, which takes a while
    if (Path(run) / "config.json").is_file() and step is None:
        return import_folder(run, out, layout=layout)
    found = checkpoint.find(run, step)
    source = open_source(found)
    state, tokenizer = checkpoint.load_state(found), load_tokenizer(source.tokenizer)
    run_dir = found.absolute().parent.parent
    metrics = read_metrics(run_dir) if (run_dir / FILE).is_file() else ([], [])
    weights, config = without_padding(source.load(), source.config, tokenizer.vocab_size)
    with _nothing_half_written(out):
        export(
            weights,
            config,
            tokenizer,
            out,
            max_seq=state.recipe["train"]["seq"],
            dtype=DTYPES[state.recipe["train"]["precision"]],
            card=model_card(out.name, config, state, metrics),
            layout=layout,
        )
    return found


def import_folder(
    folder: str | Path, out: str | Path, *, max_seq: int | None = None, layout: Format = "transformers"
) -> Path:
    """Write a Hugging Face folder that `read_folder` knows as our commands export a run; return it.

    Weights keep their types, the tokenizer and the generation config all that they say. `max_seq` is the tokens of the
    longest row that the model will see (default: by its config.json).

    Raises:
        UserError: the folder holds no such model, or `out` already holds something.
    """
    folder, out = Path(folder), Path(out).absolute()
    check_new(out)
    config, load = read_folder(folder, max_seq)
    tokenizer = _tokenizer_in(folder)
    card = folder / "README.md"
    with _nothing_half_written(out):
        export(
            load(),
            config,
            tokenizer,
            out,
            max_seq=max_seq or read_max_seq(folder),
            dtype=None,
            card=card.read_text() if card.is_file() else f"# {out.name}\n\nImported from {folder.name}.\n",
            generation=read_generation_config(folder),
            layout=layout,
        )
    return folder


def read_max_seq(folder: Path) -> int:
    """The longest context that the model of a Hugging Face folder was trained on, in tokens.

    Raises:
        UserError: its config.json does not say.
    """
    values = read_config(folder)
    if "max_position_embeddings" not in values:
        raise UserError(f"{folder}/config.json: no max_position_embeddings; expected the longest context of the model")
    return int(values["max_position_embeddings"])


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return load_tokenizer(folder)
    logger.warning("%s: no tokenizer here; put one beside the weights before text is read or written", folder)
    return None


@contextmanager
def _nothing_half_written(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(out.with_name(f".tmp-{out.name}"), ignore_errors=True)
        free = shutil.disk_usage(next(folder for folder in out.parents if folder.is_dir())).free / 1e9
        reason = " ".join(str(error).split())
        raise UserError(f"{out}: could not be written ({reason}); {free:.2f} GB are free there") from error


def model_card(
    name: str, config: ModelConfig, state: TrainState, metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> str:
    """README.md of an exported model: what it is, how to load it, how it was trained and how well it did."""
    last: dict[str, Any] = {}
    for lines in metrics:
        last |= next((line for line in reversed(lines) if line["step"] <= state.step), {})
    shown = ("loss", "validation_loss", "validation_bits_per_byte")
    results = "\n".join(f"| {key} | {last[key]:.4f} |" for key in shown if isinstance(last.get(key), float))
    dash = any(config.attention_type(layer) == "dash" for layer in range(config.layers))
    attention = "DashAttention (arXiv 2605.18753)" if dash else "full causal attention"
    requirement = (
        "Its code is in this folder and needs torch and transformers; with dash-train installed it runs on kernels.\n\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A causal language model of {config.layers} layers, hidden size {config.hidden_size}, with {attention}, trained with
DashTrain on sequences of {state.recipe["train"]["seq"]} tokens: {state.step} steps, {state.tokens} tokens.

{requirement if dash else ""}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{", trust_remote_code=True" if dash else ""})
```

## Last metrics

| metric | value |
|---|---|
{results}

## Recipe

```yaml
{yaml.safe_dump(state.recipe, sort_keys=False).strip()}
```
"""
