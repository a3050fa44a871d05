"""Out of GPU memory: which key of the recipe saves the most of what is left to save."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe


@contextmanager
def explain(recipe: Recipe, ranks: int, *, building: bool = False) -> Iterator[None]:
    """Turn torch's out-of-memory error into a UserError that names the next key to change.

    `building`: there are only weights and optimizer state yet, which no activation key makes smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lever = next(chain([] if building else _activations(recipe), _states(recipe, ranks), _lengths(recipe, ranks)))
        tried = next((f" ({s[0].lower()}{s[1:]})" for s in str(error).split(". ") if s.startswith("Tried")), "")
        raise UserError(
            f"out of GPU memory{tried}; the largest saving left is {lever}; docs/training.md says what each one costs"
        ) from error


def _activations(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.activation_checkpointing != "full":
        yield f"train.activation_checkpointing: full (now {train.activation_checkpointing})"
    if train.micro_batch_size > 1:
        yield f"a smaller train.micro_batch_size (now {train.micro_batch_size})"
    if not train.activation_offload:
        yield "train.activation_offload: true"


def _states(recipe: Recipe, ranks: int) -> Iterator[str]:
    parallel = recipe.parallel
    if ranks > 1 and parallel.zero_stage < 3:
        yield f"parallel.zero_stage: 3 (now {parallel.zero_stage})"
    if parallel.offload_optimizer == "none":
        yield "parallel.offload_optimizer: cpu" + (" with parallel.zero_stage: 2" if parallel.zero_stage == 0 else "")
    if parallel.zero_stage == 3 and parallel.offload_parameters == "none":
        yield "parallel.offload_parameters: cpu"


def _lengths(recipe: Recipe, ranks: int) -> Iterator[str]:
    parallel, model = recipe.parallel, recipe.model
    context = parallel.context
    pieces_are_whole = recipe.train.seq % (4 * context * model.attention.chunk_size) == 0
    heads_suffice = parallel.context_method == "gather" or model.kv_heads % (2 * context) == 0
    if ranks % (2 * context) == 0 and pieces_are_whole and heads_suffice:
        yield f"parallel.context: {2 * context} (now {context})"
    yield f"a shorter train.seq (now {recipe.train.seq}), or more GPUs and a larger parallel.context (now {context})"
