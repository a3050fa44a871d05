"""What a run starts from: its own newest checkpoint, the end of the stage before, another run, weights, or nothing."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dash_train.distributed.world import World, from_main
from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.recipe.stages import stage_recipes
from dash_train.training import checkpoint
from dash_train.training.checkpoint import TrainState
from dash_train.training.ema import EMA
from dash_train.training.initial import Source, open_source
from dash_train.training.model_state import WEIGHT
from dash_train.training.remote import Remote
from dash_train.training.tensor_files import read_index

EVERYTHING = ("optimizer", "schedule", "data")


@dataclass(frozen=True)
class Start:
    """Where a run, or a stage of it, begins."""

    recipe: Recipe
    """Of the stage."""
    stage: int
    source: Source | None
    """Model and tokenizer that the recipe's stand on; None: its own."""
    checkpoint: Path | None
    """Whose weights and, by `keep`, moments and counts go on; None: weights come from the source, or are drawn."""
    state: TrainState | None
    """Of that checkpoint, or of the run that the source is."""
    keep: tuple[str, ...] = ()
    resumes: bool = False
    """The run goes on within a stage, and so with all that it had."""


def find_start(recipe: Recipe, world: World | None = None) -> Start:
    """Where the run that a recipe describes stands. Every rank calls it, and all find the same.

    Raises:
        UserError: its checkpoints are damaged, or do not fit its stages, or `init` names nothing to start from.
    """
    stages = stage_recipes(recipe)
    resumed = checkpoint.newest(Path(recipe.run_dir) / "checkpoints", world)
    if resumed is None and world is not None and recipe.checkpoint.copy_to:
        address = recipe.checkpoint.copy_to
        from_main(world, lambda: Remote(address).fetch(Path(recipe.run_dir)))
        resumed = checkpoint.newest(Path(recipe.run_dir) / "checkpoints", world)
    # A run that goes on has the weights, shape and tokenizer of its base in its own folder.
    longest = max(stage.train.seq for stage in stages)
    source = open_source(resumed or recipe.init.from_, seq=longest) if recipe.init.from_ else None
    if resumed is not None:
        state = checkpoint.load_state(resumed)
        stage = _stage_at(state, [stage.steps for stage in recipe.stages] or [recipe.train.steps])
        if state.stage not in (stage, stage - 1):
            raise UserError(
                f"{resumed}: step {state.step} is of stage {state.stage} there and of stage {stage} here (counted from "
                "0): the steps of stages that are over cannot change; set stages back, or choose another run_dir"
            )
        same_stage = state.stage == stage
        return Start(stages[stage], stage, source, resumed, state, EVERYTHING, resumes=same_stage)
    if source is None or source.checkpoint is None:
        if recipe.init.keep:
            raise UserError(
                f"init.keep: {recipe.init.from_} is an exported folder, which holds weights alone; name the run or one "
                "of its checkpoints in init.from, or leave init.keep out"
            )
        return Start(stages[0], 0, source, None, None)
    if recipe.init.keep and checkpoint.is_of_deepspeed(source.checkpoint):
        raise UserError(
            f"init.keep: {source.checkpoint} is of version 0.1; run its own recipe for a step with this version, which "
            "saves a checkpoint that others can take up"
        )
    if "optimizer" in recipe.init.keep and read_index(source.checkpoint).kinds <= {WEIGHT, EMA}:
        raise UserError(
            f"init.keep: {source.checkpoint} holds weights alone (an average, or converted); leave optimizer out"
        )
    base = source.checkpoint if recipe.init.keep else None
    return Start(stages[0], 0, source, base, checkpoint.load_state(source.checkpoint), tuple(recipe.init.keep))


def _stage_at(state: TrainState, steps: list[int]) -> int:
    """The stage that takes the next step; the last one once all are over."""
    ends = list(accumulate(steps))
    return next((number for number, end in enumerate(ends) if state.step < end), len(ends) - 1)
