"""How far a run has come: what is counted, and goes on with it."""

from dataclasses import dataclass, field
from typing import Any

from dash_train.data.loader import StepBatch
from dash_train.data.rows import unique_names
from dash_train.training.checkpoint import TrainState


@dataclass
class Progress:
    """The counts of a run; all ranks have the same."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens: int = 0
    """Tokens whose loss was counted."""
    rows: int = 0
    """Rows of the training set read."""
    skipped_steps: int = 0
    """Steps skipped for a non-finite gradient."""
    nonfinite_in_a_row: int = 0
    source_tokens: list[int] = field(default_factory=list)
    """`tokens` by source; empty in a run whose beginning did not count them."""
    validation_loss: float | None = None
    """Of this step, once it has been validated."""

    def take(self, batch: StepBatch, tokens: int) -> None:
        """Count a step that learnt from a batch with so many counted tokens."""
        self.tokens += tokens
        if self.source_tokens:
            self.source_tokens = [a + b for a, b in zip(self.source_tokens, batch.source_tokens, strict=True)]
        self.pass_over(batch)

    def pass_over(self, batch: StepBatch) -> None:
        """Count a step and its rows."""
        self.step += 1
        self.rows += len(batch.rows)
        self.validation_loss = None

    def go_on_from(self, state: TrainState, seq: int, keep: tuple[str, ...]) -> None:
        """Take over the counts of a checkpoint: those of the schedule, those of the data, or both.

        Rows of another length begin where as many tokens have been read, rounded down to a row.
        """
        if "schedule" in keep:
            self.step, self.skipped_steps = state.step, state.skipped_steps
        if "data" in keep:
            self.rows = state.rows * int(state.recipe["train"]["seq"]) // seq
            self.tokens = state.tokens
            if len(state.source_tokens or []) in (0, len(self.source_tokens)):
                self.source_tokens = list(state.source_tokens or [])

    def by_source(self, sources: list[str]) -> dict[str, dict[str, int]]:
        """`tokens` for each source, where there are several; not in a run whose beginning did not count them."""
        if len(sources) == 1 or not self.source_tokens:
            return {}
        return {"source_tokens": dict(zip(unique_names(sources), self.source_tokens, strict=True))}

    def state(self, **others: Any) -> TrainState:
        """What a checkpoint of this step says."""
        return TrainState(
            step=self.step,
            tokens=self.tokens,
            skipped_steps=self.skipped_steps,
            rows=self.rows,
            source_tokens=self.source_tokens or None,
            validation_loss=self.validation_loss,
            **others,
        )
