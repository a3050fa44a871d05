"""What a run tells the world: progress on the terminal, metrics.jsonl, Weights & Biases."""

import os
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar

from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.tracking.metrics import MetricsFile


class Tracker:
    """The main rank's reporter. On a terminal a progress bar, elsewhere one plain line a step."""

    def __init__(self, recipe: Recipe, run_dir: Path, first_step: int) -> None:
        self.metrics = MetricsFile(run_dir)
        self.wandb = _start_wandb(recipe, run_dir)
        self.board = _open_tensorboard(recipe, run_dir, first_step)
        self.steps = recipe.train.steps
        self.console = Console(highlight=False)
        self.first_step, self.started = first_step, time.perf_counter()
        self.live = Live(console=self.console) if self.console.is_terminal else None
        if self.live is not None:
            self.live.start()

    def log_training(self, values: dict[str, Any]) -> None:
        """Write a training line and show it."""
        self._write(values)
        line = training_line(values, self.steps, self._eta(values["step"]))
        if self.live is not None:
            self.live.update(Group(line, ProgressBar(total=self.steps, completed=values["step"])))
        else:
            self.say(line)

    def log_skipped(self, values: dict[str, Any]) -> None:
        """Write a line for a step of `train.skip_steps`, which has no loss."""
        self._write(values)
        self.say(f"step {values['step']}/{self.steps}: passed over, as train.skip_steps says")

    def log_event(self, values: dict[str, Any]) -> None:
        """Write a line of something that happened at a step, without a loss."""
        self._write(values)

    def log_validation(self, values: dict[str, Any]) -> None:
        """Write a validation line and show it."""
        self._write(values)
        self.say(
            f"step {values['step']}: validation loss {values['validation_loss']:.4f}, "
            f"{values['validation_bits_per_byte']:.4f} bits per byte{_density(values, 'validation_density')}"
        )

    def log_figure(self, path: Path, step: int) -> None:
        """Show a PNG wherever the metrics go besides metrics.jsonl."""
        if self.wandb is not None:
            import wandb

            self.wandb.log({path.stem: wandb.Image(str(path))}, step=step)
        if self.board is not None:
            from matplotlib.image import imread

            self.board.add_image(path.stem, imread(path), step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Show a line (above the progress bar, where there is one). A reader who has gone, as the `tee` of a pipeline
        that Ctrl-C has ended, keeps no run from saving."""
        try:
            if self.live is not None:
                self.console.print(text, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()
        self.metrics.close()

    def _write(self, values: dict[str, Any]) -> None:
        self.metrics.write(values)
        if self.wandb is None and self.board is None:
            return
        flat = _flat(values)
        if self.wandb is not None:
            self.wandb.log(flat, step=values["step"])
        for key, value in flat.items() if self.board is not None else ():
            if isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, values["step"])

    def _eta(self, step: int) -> float:
        done = max(step - self.first_step, 1)
        return (time.perf_counter() - self.started) / done * (self.steps - step)


def training_line(values: dict[str, Any], steps: int, eta: float) -> str:
    """One step as a line of text: loss, lr, grad norm, tokens/s, MFU, memory, mean density, time left."""
    mfu = f" | mfu {values['mfu']:.1%}" if values.get("mfu") is not None else ""
    skipped = f" | skipped {values['skipped_steps']}" if values["skipped_steps"] else ""
    return (
        f"step {values['step']}/{steps} | loss {values['loss']:.4f} | lr {values['lr']:.2e} | "
        f"grad_norm {values['grad_norm']:.3f} | {values['tokens_per_second']:,.0f} tokens/s{mfu} | "
        f"{values['memory_gb']:.1f} GB{_density(values, 'density', ' |')}{skipped} | eta {_clock(eta)}"
    )


def _density(values: dict[str, Any], key: str, separator: str = ",") -> str:
    densities = [density for density in values.get(key, []) if density is not None]
    return f"{separator} density {sum(densities) / len(densities):.3f}" if densities else ""


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """One number a key: `density/3` of layer 3, `source_tokens/stdlib` of a source."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            flat |= {f"{key}/{layer}": number for layer, number in enumerate(value)}
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        else:
            flat[key] = value
    return flat


def check_tensorboard(recipe: Recipe) -> None:
    """See that TensorBoard's files can be written, where the recipe wants them.

    Raises:
        UserError: the package is not there.
    """
    if recipe.tracking.tensorboard and find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard: true needs the package tensorboard: pip install tensorboard")


def _open_tensorboard(recipe: Recipe, run_dir: Path, first_step: int) -> Any:
    if not recipe.tracking.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # Steps that a resume takes again are shown once.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)


def check_wandb(recipe: Recipe) -> None:
    """See that Weights & Biases can be reached as the recipe wants it, before anything is made for the run.

    Raises:
        UserError: `online` without a key.
    """
    if recipe.tracking.wandb != "online":
        return
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return
        reason = ""
    except (wandb.errors.Error, ValueError) as error:
        reason = f" ({' '.join(str(error).split())})"
    raise UserError(
        f"tracking.wandb: online needs a key of Weights & Biases, found none{reason}: run `wandb login`, set "
        "WANDB_API_KEY, or take offline or auto"
    )


def _start_wandb(recipe: Recipe, run_dir: Path) -> Any:
    """The W&B run, or None. Its id is kept in the run folder, so that a resumed run goes on in the same one."""
    mode = recipe.tracking.wandb
    if mode == "off":
        return None
    import wandb

    if mode == "auto":
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text() if id_file.exists() else uuid.uuid4().hex[:8]
    id_file.write_text(run_id)
    return wandb.init(
        project=recipe.tracking.project,
        name=run_dir.name,
        dir=str(run_dir),
        id=run_id,
        resume="allow",
        mode=mode,
        config=recipe.model_dump(mode="json", by_alias=True),
    )
