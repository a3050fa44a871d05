"""What checkpoints a run has, and whether they are sound."""

from pathlib import Path

from dash_train.errors import UserError
from dash_train.training import checkpoint


def table(run: Path) -> str:
    """A line for each checkpoint, the oldest first: step, tokens, validation loss, ranks, size; sizes are checked.

    Raises:
        UserError: there is none.
    """
    lines = [f"{'checkpoint':16} {'tokens':>16} {'validation':>10} {'stage':>5} {'ranks':>5} {'GB':>8}"]
    for path in _all(run):
        if not checkpoint.is_complete(path):
            lines.append(f"{path.name:16} damaged: verify says how")
            continue
        state = checkpoint.load_state(path)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 1e9
        loss = "" if state.validation_loss is None else f"{state.validation_loss:.4f}"
        lines.append(f"{path.name:16} {state.tokens:>16,} {loss:>10} {state.stage:>5} {state.world:>5} {size:>8.3f}")
    return "\n".join(lines)


def verify(run: Path) -> list[str]:
    """Read every file of every checkpoint; a line for each that is sound.

    Raises:
        UserError: one is damaged, or there is none; every damaged one is named, with its file.
    """
    problems = {path: checkpoint.problem_of(path) for path in _all(run)}
    if damaged := [f"{path.name}: {problem}" for path, problem in problems.items() if problem]:
        sound = [path.name for path, problem in problems.items() if not problem]
        raise UserError(f"{run}: {'; '.join(damaged)}; sound: {', '.join(sound) or 'none'}")
    return [f"{path.name}: complete, every hash is right" for path in problems]


def _all(run: Path) -> list[Path]:
    found = checkpoint.checkpoints_in(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: expected a run folder with checkpoints, found none")
    return found[::-1]
