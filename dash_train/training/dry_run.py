"""What a run would do, as far as that can be known without training: nothing is written, and no GPU is needed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from dash_train.data.loader import IGNORE, RowDataset
from dash_train.data.mixture import Mixture
from dash_train.data.prepare import cache_key
from dash_train.data.rows import training_rows
from dash_train.data.sources import describe, source_files
from dash_train.data.tokenizer import Tokenizer, load_tokenizer
from dash_train.errors import UserError
from dash_train.estimate.memory import memory_parts, on_gpu
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import Recipe
from dash_train.recipe.stages import stage_recipes
from dash_train.training.engine import deepspeed_config
from dash_train.training.initial import copy_weights, resolve_model
from dash_train.training.resume import check_recipe
from dash_train.training.run_data import folder_of
from dash_train.training.schedule import lr_factor
from dash_train.training.start import Start, find_start

SHOWN = 60  # characters of the first row


def dry_run(recipe: Recipe, ranks: int = 1) -> Iterator[str]:
    """Check a recipe for so many ranks and yield lines that say what it would do.

    Raises:
        UserError, DataError: the run would be refused, for what can be seen before it starts.
    """
    start = find_start(recipe)
    yield from _beginning(recipe, start)
    stages = stage_recipes(recipe)
    for number, stage in enumerate(stages[start.stage :], start=start.stage):
        if len(stages) > 1:
            yield f"stage {number + 1} of {len(stages)}, to step {stage.train.steps}:"
        deepspeed_config(stage, ranks)
        if ranks % stage.parallel.context:
            raise UserError(
                f"parallel.context: {stage.parallel.context} ranks share a row, but the run has {ranks}, not a "
                "multiple of it"
            )
        micro_batches = stage.train.micro_batches(ranks, stage.parallel.context)
        yield from _stage(stage, start, ranks, micro_batches)


def _beginning(recipe: Recipe, start: Start) -> Iterator[str]:
    if start.state and start.checkpoint and (start.resumes or start.stage):
        check_recipe(start.checkpoint, start.state, start.recipe, start.state.world)
        yield f"resumes from {start.checkpoint}: {start.state.tokens:,} tokens trained on"
    elif start.checkpoint:
        yield f"starts from {start.checkpoint}, with its {', '.join(start.keep)}"
    elif start.source:
        yield f"starts from the weights of {recipe.init.from_}"
    else:
        yield f"starts with weights drawn from seed {recipe.train.seed}"
    existing = _existing(Path(recipe.run_dir))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir: {recipe.run_dir}: {existing} is no folder in which this user can write")
    yield f"run folder: {recipe.run_dir}"


def _stage(recipe: Recipe, start: Start, ranks: int, micro_batches: int) -> Iterator[str]:
    folder, tokenizer, vocab_size = _find_data(recipe, start)
    recipe = resolve_model(recipe, start.source, vocab_size)
    train, model_config = recipe.train, recipe.model
    with torch.device("meta"):
        model = LanguageModel(model_config)
    if start.source and not start.checkpoint:
        copy_weights(model, start.source.load(), str(recipe.init.from_))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kinds = [model_config.attention_type(layer) for layer in range(model_config.layers)]
    yield (
        f"model: {parameters:,} parameters, {model_config.layers} layers of width {model_config.hidden_size} "
        f"({kinds.count('dash')} Dash, {kinds.count('full')} full), vocabulary {model_config.vocab_size}"
    )
    yield (
        f"a step: {train.global_batch_size} rows of {train.seq:,} tokens on {ranks} rank(s), {micro_batches} "
        f"micro-batch(es) of {train.micro_batch_size}; {train.steps:,} steps are "
        f"{train.steps * train.global_batch_size * train.seq:,} tokens at most"
    )
    yield from _rates(recipe)
    yield from _memory(recipe, parameters, ranks)
    yield from _space(recipe, parameters)
    if folder is None:
        files = [(describe(source), list(source_files(source))) for source in recipe.data.sources]
        for name, found in files:
            size = sum(file.stat().st_size for file in found if isinstance(file, Path)) / 2**20
            yield f"data: {name}: {len(found)} file(s), {size:,.1f} MiB, not prepared yet (launch/prepare.py does it)"
        return
    rows = training_rows(
        recipe.data,
        folder,
        seq=train.seq,
        chunk_size=model_config.attention.chunk_size,
        global_batch_size=train.global_batch_size,
    )
    yield f"data: {folder}"
    needed = train.steps * train.global_batch_size
    yield f"  {rows.rows(0):,} rows in the first epoch, {rows.fill():.1%} full; the run reads {needed:,}"
    yield from _first_batch(rows, tokenizer, train.global_batch_size)


def _find_data(recipe: Recipe, start: Start) -> tuple[Path | None, Tokenizer | None, int]:
    """The prepared folder, where there is one; the tokenizer and its size, where that is known already."""
    data = recipe.data
    folder = folder_of(start.state, data)
    if folder is None and start.source is None and start.checkpoint is None:
        made = Path(data.cache) / cache_key(data)
        folder = made if made.is_dir() else None
    if folder is not None:
        tokenizer = load_tokenizer(folder / "tokenizer")
    elif data.tokenizer.path is not None:
        tokenizer = load_tokenizer(data.tokenizer.path)
    elif start.source is not None:
        tokenizer = load_tokenizer(start.source.tokenizer)
    else:
        return None, None, data.tokenizer.vocab_size
    return folder, tokenizer, tokenizer.vocab_size


def _rates(recipe: Recipe) -> Iterator[str]:
    steps = recipe.schedule.steps or recipe.train.steps
    places = sorted({0, min(recipe.schedule.warmup_steps, steps - 1), steps // 2, steps - 1})
    rates = (f"{recipe.optimizer.lr * lr_factor(step, steps, recipe.schedule):.2e} at {step + 1:,}" for step in places)
    yield f"learning rate: {', '.join(rates)}"


def _memory(recipe: Recipe, parameters: int, ranks: int) -> Iterator[str]:
    """What a rank holds (`launch/estimate.py` says more)."""
    parts = memory_parts(recipe, ranks)
    if recipe.optimizer.ema:
        parts["moving average"] = 4 * parameters / ranks
    if recipe.checkpoint.asynchronous:
        parts["host"] += 12 * parameters / ranks
    largest = sorted((name for name in parts if name != "host" and parts[name]), key=lambda name: -parts[name])
    listed = ", ".join(f"{name} {parts[name] / 1e9:.2f}" for name in largest)
    yield f"memory of a rank, about: {on_gpu(parts) / 1e9:.2f} GB ({listed})"
    yield f"  in host memory {parts['host'] / 1e9:.2f} GB, the copy of a checkpoint included"


def _space(recipe: Recipe, parameters: int) -> Iterator[str]:
    """What checkpoints take on the disk: fp32 weights and two moments."""
    size = parameters * (16 if recipe.optimizer.ema else 12) / 1e9
    saving = recipe.checkpoint
    kept = saving.keep_last + saving.keep_best + 1  # and the one that is being written
    if saving.keep_every:
        kept += recipe.train.steps // saving.keep_every
    free = shutil.disk_usage(_existing(Path(recipe.run_dir))).free / 1e9
    warning = "" if kept * size < free else "; TOO LITTLE"
    yield f"checkpoints: {size:.2f} GB each, {kept * size:.1f} GB at most; {free:.1f} GB are free{warning}"


def _existing(path: Path) -> Path:
    """A path, or the nearest above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _first_batch(rows: RowDataset | Mixture, tokenizer: Tokenizer | None, size: int) -> Iterator[str]:
    batch = [rows.row(index) for index in range(size)]
    counted = sum(int((row["labels"] != IGNORE).sum()) for row in batch)
    documents = sum(len(row["document_starts"][row["real"]].unique()) for row in batch)
    yield f"  first batch: {documents} documents, {counted:,} tokens that count"
    if tokenizer is not None:
        real = batch[0]["tokens"][batch[0]["real"]][: 4 * SHOWN].tolist()
        yield f"  it begins: {tokenizer.decode(real)[:SHOWN]!r}"
