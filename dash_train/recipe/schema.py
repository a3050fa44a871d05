"""The recipe: one YAML file that says everything about a run, as plain typed data.

`load.py` reads it and applies `key.sub=value` overrides; docs/recipe.md is generated from these classes.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from dash_train.data.config import DataConfig
from dash_train.errors import UserError
from dash_train.model.config import ActivationCheckpointing, ModelConfig
from dash_train.recipe.section import PositiveFloat, PositiveInt, Section

Ratio = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class InitConfig(Section):
    from_: str | None = Field(default=None, alias="from")
    """Weights to start from: a run folder, one of its checkpoints, or an exported (Hugging Face) folder; null draws
    random weights."""
    keep: list[Literal["optimizer", "schedule", "data"]] = Field(default_factory=list)
    """What else of the run that `from` names goes on: `optimizer` (moments), `schedule` (the count of steps, so that
    train.steps and the schedule count from that run's beginning), `data` (the place in the training rows). Whatever is
    not named starts fresh."""

    @field_validator("from_")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else _expand(value)

    @model_validator(mode="after")
    def _something_to_keep(self) -> "InitConfig":
        if self.keep and self.from_ is None:
            raise ValueError("keep: needs init.from, the run of which something is kept")
        return self


class OptimizerConfig(Section):
    type: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for the blocks' matrices and AdamW for embeddings, output, norms and chunk_query. Muon's
    updates are as large as AdamW's, so that learning rate and weight decay mean the same."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    momentum: Decay | None = None
    """Decay rate of Muon's momentum; null takes 0.95."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; embeddings, norms, biases and chunk_query get none."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, updated every step and kept in checkpoints beside them
    (0.999 averages over some thousand steps); null keeps none."""


class ScheduleConfig(Section):
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warmup: cosine to the end, warmup-stable-decay, or constant."""
    steps: PositiveInt | None = None
    """Steps over which it runs; null takes train.steps (of a recipe with stages: those of all stages)."""
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
    skip_steps: list[tuple[PositiveInt, PositiveInt]] = Field(default_factory=list)
    """Steps, from the first to the last of each pair, that are passed over: `[[5000, 5040]]` after a loss spike.
    Nothing is learnt from their rows; all other steps read the rows that they would have read."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps with a non-finite gradient are skipped; this many in a row stop the run."""
    on_spike: Literal["ignore", "warn", "rollback"] = "warn"
    """What a step does whose loss stands far above those before it (`spike_threshold`): nothing, a warning, or
    `rollback`: the last checkpoint is loaded again, and training goes on after the rows that led to the spike."""
    spike_threshold: PositiveFloat = 8.0
    """How far above the median of the last 64 losses a spike stands, in standard deviations (estimated from the median
    distance to the median)."""
    time_limit: PositiveFloat | None = None
    """Seconds after the start of the command at which the run saves and ends (exit code 0); null: no limit."""

    @field_validator("skip_steps")
    @classmethod
    def _ordered(cls, value: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if wrong := [list(pair) for pair in value if pair[0] > pair[1]]:
            raise ValueError(f"{wrong[0]}: the first is after the last")
        return value

    def skips(self, step: int) -> bool:
        """Whether a step (from 1) is one of `skip_steps`."""
        return any(first <= step <= last for first, last in self.skip_steps)

    def micro_batches(self, ranks: int = 1, context: int = 1) -> int:
        """Micro-batches of a step on each of `ranks`, where every `context` of them share their rows.

        Raises:
            UserError: the rows of a step cannot be divided so.
        """
        count, rest = divmod(self.global_batch_size, self.micro_batch_size * (ranks // context))
        if rest:
            times = f" times the number of ranks ({ranks})" if ranks > 1 else ""
            shared = f" over parallel.context ({context})" if context > 1 else ""
            raise UserError(
                f"train.global_batch_size ({self.global_batch_size}) must be a multiple of train.micro_batch_size "
                f"({self.micro_batch_size}){times}{shared}"
            )
        return count


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
    keep_every: PositiveInt | None = None
    """Checkpoints of every multiple of so many steps are kept as well; null: of none."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many checkpoints of the lowest validation loss are kept as well, of those whose step was validated."""
    copy_to: str | None = None
    """Address that fsspec knows (`s3://bucket/run`, a folder of another disk) to which every checkpoint is copied; a
    run folder without checkpoints goes on from the newest there. Nothing is removed there. null: no copies."""
    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in host memory (12 bytes a parameter, over the ranks)."""


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
    compare_ranks_every: Annotated[int, Field(ge=0)] = 200
    """Steps between comparisons of the ranks, which warn of those that hold the others up (a product on each GPU, and
    the wait for data); 0 never compares."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl for TensorBoard, too, into the run folder's `tensorboard` (package
    tensorboard)."""
    profile: ProfileConfig | None = None
    """Steps of which the main rank writes a torch trace and, on CUDA, a memory snapshot into the run folder's
    `profile`; null records nothing. Recorded steps are slower."""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_no_truth_value(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a plain off


class RunStage(Section):
    steps: PositiveInt
    """Optimizer steps of the stage."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section that the stage has of its own, as are those below: `{attention: {routing_block: 16}}`."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Its text: other sources or weights. The tokenizer stays."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Its optimizer; the moments go on."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Its learning rate."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Its rows and batches: `{seq: 32768, global_batch_size: 16}`."""
    parallel: dict[str, Any] = Field(default_factory=dict)
    """How its work is spread over the ranks."""
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    """What it saves."""
    tracking: dict[str, Any] = Field(default_factory=dict)
    """What it tells."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Its DeepSpeed configuration."""


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
    """AdamW or Muon."""
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
    stages: list[RunStage] = Field(default_factory=list)
    """Stages that follow each other in one run, each with keys of its own: weights, moments, count of steps and place
    in the text go on from one to the next. train.steps is the sum of their steps. An empty list: the recipe is one."""

    @field_validator("run_dir")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return _expand(value)

    @model_validator(mode="after")
    def _sum_of_stages(self) -> "Recipe":
        steps = sum(stage.steps for stage in self.stages)
        if self.stages and "steps" in self.train.model_fields_set and self.train.steps != steps:
            raise ValueError(f"train.steps ({self.train.steps}) is not the sum of the stages' ({steps}); leave it out")
        if self.stages:  # by-passing validate_assignment, which would begin again here
            self.__dict__["train"] = self.train.model_copy(update={"steps": steps})
        return self

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
        train.micro_batches()
        if train.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "train.precision bf16 needs parallel.zero_stage 1, 2 or 3: DeepSpeed's stage 0 applies Adam's first "
                "step twice in bf16"
            )
        if self.optimizer.type == "muon" and self.parallel.offload_optimizer != "none":
            raise ValueError(
                "optimizer.type muon needs parallel.offload_optimizer: none; matrices are made orthogonal on the GPU"
            )
        if self.optimizer.type != "muon" and self.optimizer.momentum is not None:
            raise ValueError("optimizer.momentum is Muon's: set optimizer.type: muon, or leave it out")
        if train.activation_offload and train.activation_checkpointing == "none":
            raise ValueError("train.activation_offload needs train.activation_checkpointing: full or selective")
        return self

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML; of one with stages what was set, since a stage stands on that alone."""
        values = self.model_dump(mode="json", by_alias=True, exclude_unset=bool(self.stages))
        path.write_text(yaml.safe_dump(values, sort_keys=False))


def _expand(path: str) -> str:
    """A path with `~` and `$VARIABLES` replaced, as a shell would."""
    if not path.strip() or "\0" in path:
        raise ValueError(f"expected a path, found {path!r}")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{path}: the variable {left[0]} is not set")
    return expanded
