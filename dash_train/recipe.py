"""The recipe: one YAML file that says everything about a run, as plain typed data.

`load_recipe` reads it, applies `key.sub=value` overrides and checks it; docs/recipe.md is generated from these classes.
"""

import difflib
import os
import re
import reprlib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dash_train.data.config import DataConfig
from dash_train.errors import UserError
from dash_train.model.config import ActivationCheckpointing, ModelConfig, PositiveFloat, PositiveInt, Section

Ratio = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

MOST_BYTES, MOST_KEYS = 1 << 20, 10_000  # a recipe has a few hundred; more is another file, or aliases that multiply
LARGEST_FLOAT, LARGEST_INT = 1e30, 2**63 - 1  # what float32 and 64 bits hold with room to compute


class InitConfig(Section):
    from_: str | None = Field(default=None, alias="from")
    """Weights to start from: a run folder, one of its checkpoints, or an exported (Hugging Face) folder; null draws
    random weights. The optimizer and the schedule always start fresh."""

    @field_validator("from_")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else _expand(value)


class OptimizerConfig(Section):
    lr: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; embeddings, norms and chunk_query get none."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""


class ScheduleConfig(Section):
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warmup: cosine to the end, warmup-stable-decay, or constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: PositiveInt | None = None
    """`wsd`: steps of the final decay, at most those after the warmup; null takes a fifth of the run."""
    decay: Literal["linear", "1-sqrt"] = "1-sqrt"
    """`wsd`: shape of the final decay."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end, as a share of the peak."""


class TrainConfig(Section):
    steps: PositiveInt = 1000
    """Optimizer steps."""
    seq: PositiveInt = 8192
    """Tokens per row; a multiple of model.attention.chunk_size."""
    micro_batch_size: PositiveInt = 1
    """Rows that one rank runs at a time."""
    global_batch_size: PositiveInt = 8
    """Rows of one optimizer step over all ranks; a multiple of micro_batch_size times the number of ranks over
    parallel.context."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights, moments and gradient accumulation are fp32 either way."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full` keeps only each block's input and recomputes the rest in the backward pass; `selective` keeps attention's
    output as well, and recomputes all but attention."""
    activation_offload: bool = False
    """Keep the blocks' inputs in pinned host memory until the backward pass; needs activation_checkpointing."""
    seed: int = 0
    """Seed of the initial weights."""
    validate_every: Annotated[int, Field(ge=0)] = 100
    """Steps between validations (also before the first step and after the last); 0 never validates."""
    validation_rows: PositiveInt = 64
    """Rows of the validation set that a validation reads."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps with a non-finite gradient are skipped; this many in a row stop the run."""


class ParallelConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is partitioned over the ranks (1 optimizer state, 2 also gradients, 3 also weights)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps master weights and moments in host memory and runs AdamW there; needs zero_stage 1, 2 or 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """`cpu` keeps the weights in host memory, too; needs zero_stage 3 and offload_optimizer."""
    context: PositiveInt = 1
    """Ranks that share every row, each with an equal part of its tokens; train.seq must be a multiple of
    2 x context x chunk_size."""
    context_method: Literal["gather", "ulysses"] = "gather"
    """What attention exchanges: every rank gathers the keys and values of whole rows, or (`ulysses`) each takes whole
    rows of some heads, which needs kv_heads to be a multiple of context."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest that one phase of a step (a micro-batch, the optimizer, a checkpoint) may take once the first step is
    done; with several ranks, a longer one is taken for a hang and ends the run with the name of the rank."""

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            raise ValueError("offload_optimizer: cpu needs zero_stage 1, 2 or 3")
        if self.offload_parameters == "cpu" and (self.zero_stage != 3 or self.offload_optimizer == "none"):
            raise ValueError("offload_parameters: cpu needs zero_stage 3 and offload_optimizer: cpu")
        return self


class CheckpointConfig(Section):
    every: PositiveInt = 500
    """Steps between checkpoints (also at the end, and on SIGTERM or SIGUSR1)."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""


class ProfileConfig(Section):
    steps: tuple[PositiveInt, PositiveInt]
    """First and last step that are recorded, for example [10, 12]; what comes first is seldom typical."""

    @model_validator(mode="after")
    def _ordered(self) -> "ProfileConfig":
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"steps {list(self.steps)}: the first is after the last")
        return self


class TrackingConfig(Section):
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "off"
    """Weights & Biases; `auto` is online when logged in, else offline. The run id survives a resume."""
    project: str = "dash-train"
    """Weights & Biases project."""
    router_gradients_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of the gradients' norms through the router, per layer (a second backward pass of
    attention); 0 never measures."""
    profile: ProfileConfig | None = None
    """Steps of which the main rank writes a torch trace and, on CUDA, a memory snapshot into the run folder's
    `profile`; null records nothing. Recorded steps are slower."""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_no_truth_value(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a plain off


class Recipe(Section):
    run_dir: str
    """Folder of the run: resolved recipe, checkpoints, metrics.jsonl, figures. A run that finds a checkpoint there
    resumes from it."""
    init: InitConfig = InitConfig()
    """Where the weights come from."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    data: DataConfig = DataConfig()
    """Text, tokenizer, rows."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    train: TrainConfig = TrainConfig()
    """Steps, batches, precision, validation."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is spread over ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved, and when."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go besides metrics.jsonl."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Added to the generated DeepSpeed configuration; keys are checked, and those the recipe sets are refused."""

    @field_validator("run_dir")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return _expand(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        train, chunk_size = self.train, self.model.attention.chunk_size
        if train.seq % chunk_size:
            raise ValueError(f"train.seq ({train.seq}) must be a multiple of model.attention.chunk_size ({chunk_size})")
        context, kv_heads = self.parallel.context, self.model.kv_heads
        if context > 1 and train.seq % (2 * context * chunk_size):
            raise ValueError(
                f"train.seq ({train.seq}) must be a multiple of 2 x parallel.context ({context}) x "
                f"model.attention.chunk_size ({chunk_size}) = {2 * context * chunk_size}: each of the {context} ranks "
                "that share a row holds two pieces of whole chunks"
            )
        window = max(self.model.routing_window(layer) for layer in range(self.model.layers))
        reach = train.seq // (2 * context) + 1
        if context > 1 and self.parallel.context_method == "gather" and window > reach:
            raise ValueError(
                f"model.attention.routing_window ({window}) must be at most train.seq / (2 x parallel.context) + 1 = "
                f"{reach}: a rank gets queries of no more than the piece before each of its own"
            )
        if self.parallel.context_method == "ulysses" and kv_heads % context:
            raise ValueError(
                f"parallel.context_method ulysses needs model.kv_heads ({kv_heads}) to be a multiple of "
                f"parallel.context ({context}); use gather"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({train.global_batch_size}) must be a multiple of "
                f"train.micro_batch_size ({train.micro_batch_size})"
            )
        if train.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "train.precision bf16 needs parallel.zero_stage 1, 2 or 3: DeepSpeed's stage 0 applies Adam's first "
                "step twice in bf16"
            )
        if train.activation_offload and train.activation_checkpointing == "none":
            raise ValueError("train.activation_offload needs train.activation_checkpointing: full or selective")
        return self

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` strings; values are YAML, list items are addressed by number (`data.sources.0.path`).

    Raises:
        UserError: one line with file, line, key, what was expected and the nearest right name of an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; recipes/ holds examples")
    values, lines = _parse(_read(path), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `section: ...` keys, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, path, lines)) from error
    except RecursionError as error:
        raise UserError(f"{path}: values that are nested too deeply") from error
    _check_numbers(recipe.model_dump(by_alias=True), path, lines)
    return recipe


def merge(into: dict[str, Any], extra: dict[str, Any]) -> None:
    """Put the values of `extra` into `into`, section by section."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example train.steps=100")
    node: Any = values
    parts: list[Any] = [int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split(".")]
    shown = reprlib.repr(override)
    try:
        value, _ = _parse(text, f"override {shown}")
    except UserError as error:
        quoted = f"; text with such signs needs quotes of its own: {key}=\"'{text}'\"" if len(text) < 80 else ""
        raise UserError(f"{error}{quoted}") from error
    try:
        for part, following in pairwise(parts):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = [] if isinstance(following, int) else {}
            elif isinstance(node, list) and part == len(node):
                node.append({})
            node = node[part]
        if isinstance(node, list) and parts[-1] == len(node):
            node.append(None)
        node[parts[-1]] = value
    except (TypeError, IndexError, KeyError) as error:
        raise UserError(f"override {shown}: {key[:80]} names nothing in this recipe") from error


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES >> 20} MiB; is this a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parse(text: str, origin: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The values of a YAML text, and the line of every key."""
    try:
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader), origin)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark and not origin.startswith("override") else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{origin}{where}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: not a recipe: its values nest too deeply, or hold themselves") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # a date, number or truth value that is none
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _expand(path: str) -> str:
    """A path with `~` and `$VARIABLES` replaced, as a shell would."""
    if not path.strip() or "\0" in path:
        raise ValueError(f"expected a path, found {path!r}")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{path}: the variable {left[0]} is not set")
    return expanded


def _check_numbers(values: Any, path: Path, lines: dict[tuple[Any, ...], int], prefix: tuple[Any, ...] = ()) -> None:
    """Refuse what no run can compute with: infinities, and numbers that overflow on the way."""
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    for key, value in values.items() if isinstance(values, dict) else ():
        name = (*prefix, key)
        _check_numbers(value, path, lines, name)
        too_large = isinstance(value, float) and not abs(value) <= LARGEST_FLOAT
        if too_large or (isinstance(value, int) and abs(value) > LARGEST_INT):
            where = f"{path}:{lines[name]}" if name in lines else str(path)
            most = f"{LARGEST_FLOAT:g}" if isinstance(value, float) else "64 bits"
            raise UserError(f"{where}: {_dotted(name)}: expected a finite number of at most {most}, found {value}")


def _key_lines(node: Any, path: str, prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """The line of every key, for messages; a key that stands twice is refused, since YAML would drop the first."""
    lines: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise UserError(f"{path}:{line}: a key must be plain text; was a {{{{ template }}}} left in?")
            name = (*prefix, key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{path}:{line}: {_dotted(name)} is set twice (first in line {lines[name]})")
            lines[name] = line
            lines |= _key_lines(value, path, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*prefix, index)] = value.start_mark.line + 1
            lines |= _key_lines(value, path, (*prefix, index))
    if len(lines) > MOST_KEYS:
        raise UserError(f"{path}: more than {MOST_KEYS} values; is this a recipe, or do its aliases multiply?")
    return lines


def _describe(error: ValidationError, path: Path, lines: dict[tuple[Any, ...], int]) -> str:
    """One line for the first key that is wrong (a value that fits no type of a union has one error per type)."""
    errors = error.errors()
    location, section = _locate(errors[0]["loc"])
    same_key = [e for e in errors if _locate(e["loc"])[0] == location]
    others = len({_locate(e["loc"])[0] for e in errors}) - 1
    where = f"{path}:{lines[location]}" if location in lines else str(path)
    key = f"{_dotted(location)}: " if location else ""
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        message = "unknown key" + _nearest(location, section)
    elif kind == "missing":
        message = "is required"
    elif kind == "value_error":
        message = str(errors[0]["ctx"]["error"])
    else:
        expected = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input ") for e in same_key))
        message = f"{expected}, found {reprlib.repr(errors[0]['input'])}"
    return f"{where}: {key}{message}" + (f" (and {others} more)" if others else "")


def _locate(loc: tuple[int | str, ...]) -> tuple[tuple[Any, ...], type[BaseModel] | None]:
    """The recipe key of a pydantic location (which also names union branches), and the section it stands in."""
    section: type[BaseModel] | None = Recipe
    node: Any = Recipe
    key: list[Any] = []
    for part in loc:
        if isinstance(part, int):
            key.append(part)
        elif node is not None:
            section = node
            key.append(part)
            node = None
            field = next((f for n, f in section.model_fields.items() if (f.alias or n) == part), None)
            if field is not None:
                node = next((t for t in flatten_annotation(field.annotation) if is_section(t)), None)
    return tuple(key), section


def flatten_annotation(annotation: Any) -> list[Any]:
    """An annotation's own types: `list[A] | None` has list[A], A and None."""
    return [annotation] + [inner for arg in get_args(annotation) for inner in flatten_annotation(arg)]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    keys = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        keys.append(key)
        for inner in filter(is_section, flatten_annotation(field.annotation)):
            keys += recipe_keys(inner, f"{key}.")
    return keys


def _nearest(location: tuple[Any, ...], section: type[BaseModel] | None) -> str:
    *parents, name = [str(part) for part in location]
    siblings = [field.alias or n for n, field in section.model_fields.items()] if section else []
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {'.'.join([*parents, close[0]])}?"
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(recipe_keys())}
    if close := difflib.get_close_matches(name, list(elsewhere), n=1):
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; here stand {', '.join(siblings)}"


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location)
