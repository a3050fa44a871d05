"""A run's checkpoint as a Hugging Face folder with a model card."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from dash_train.data.tokenizer import load_tokenizer
from dash_train.errors import UserError
from dash_train.huggingface.conversion import check_new, export, without_padding
from dash_train.model.config import ModelConfig
from dash_train.tracking.metrics import FILE, read_metrics
from dash_train.training import checkpoint
from dash_train.training.checkpoint import TrainState
from dash_train.training.initial import DTYPES, tokenizer_of


def export_run(run: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Export the checkpoint of `step` (default: the newest) of a run folder; return that checkpoint's folder.

    The weights are written in the precision they were trained in: bfloat16, or float32 with `train.precision: fp32`.

    Raises:
        UserError: there is no such checkpoint, or `out` already holds something.
    """
    out = Path(out).absolute()
    check_new(out)  # before the weights are gathered, which takes a while
    found = checkpoint.find(run, step)
    run_dir = found.absolute().parent.parent
    state, config = checkpoint.load_state(found), checkpoint.load_model_config(found)
    tokenizer = load_tokenizer(tokenizer_of(found))
    metrics = read_metrics(run_dir) if (run_dir / FILE).is_file() else ([], [])
    weights, config = without_padding(checkpoint.load_weights(found), config, tokenizer.vocab_size)
    with _nothing_half_written(out):
        export(
            weights,
            config,
            tokenizer,
            out,
            max_seq=state.recipe["train"]["seq"],
            dtype=DTYPES[state.recipe["train"]["precision"]],
            card=model_card(out.name, config, state, metrics),
        )
    return found


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
    requirement = "It needs the dash-train package: pass `trust_remote_code=True`, or import dash_train first.\n\n"
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
