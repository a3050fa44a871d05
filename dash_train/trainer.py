"""Pretraining and fine-tuning: a recipe in, a trained run folder out."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from dash_train import checkpoint
from dash_train.agreement import check_agreement
from dash_train.checkpoint import TrainState
from dash_train.data.loader import IGNORE, RowDataset, StepBatch, step_batches, validation_batches
from dash_train.data.prepare import prepare
from dash_train.data.tokenizer import load_tokenizer
from dash_train.engine import build_engine, deepspeed_config, grad_norm, set_lr
from dash_train.errors import UserError
from dash_train.garbage import frozen_heap
from dash_train.initial import Source, build_model, open_source, resolve_model
from dash_train.memory import naming_the_lever
from dash_train.model.calibration import calibrate_routing_scale, set_routing_scales
from dash_train.parallel import from_main, init_world, join_context, max_over_ranks, sum_over_ranks
from dash_train.plot import plot_run
from dash_train.profiler import StepProfiler
from dash_train.recipe import Recipe
from dash_train.resume import check_resumable
from dash_train.router_gradients import RouterGradients
from dash_train.rows import rows_from
from dash_train.run_folder import claim, nothing_left_of_a_refusal, release
from dash_train.schedule import lr_factor
from dash_train.signals import StopFlag
from dash_train.throughput import Throughput
from dash_train.totals import Totals
from dash_train.tracking import Tracker, check_wandb, log_to_file, write_environment
from dash_train.watchdog import Watchdog

CALIBRATION_BATCH = 16384  # tokens that `routing_scale: auto` looks at together

logger = logging.getLogger(__name__)


def calibration_rows(seq: int) -> int:
    """How many rows of `seq` tokens `routing_scale: auto` looks at: 8 or 64K tokens, whichever is more, and 32 where
    these are at most a million tokens: with few documents in a row, density differs by factors from row to row.
    """
    return max(8, math.ceil(2**16 / seq), min(32, 2**20 // seq))


class Trainer:
    """Everything one rank holds during a run. `train()` is the run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.run_dir = Path(recipe.run_dir)
        self.stop = StopFlag()
        self.world = init_world()
        self.device = self.world.device
        check_agreement(recipe)
        self.context = join_context(self.world, recipe.parallel)
        self.readers = self.world.size // self.context.size  # data-parallel ranks
        self._check_batch()
        from_main(self.world, lambda: check_wandb(recipe))
        with nothing_left_of_a_refusal(self.run_dir, self.world):
            self._set_up()

    def _set_up(self) -> None:
        """Data, model, engine, and the state of the newest checkpoint where there is one."""
        recipe = self.recipe
        claim(self.run_dir, self.world)
        log = log_to_file(self.run_dir, self.world)
        self.watchdog = Watchdog(self.world, recipe.parallel.timeout_seconds, log)
        resumed = checkpoint.newest(self.run_dir / "checkpoints", self.world)
        # A run that goes on has the weights, shape and tokenizer of its base in its own folder.
        source = open_source(resumed or recipe.init.from_) if recipe.init.from_ else None
        data_folder = self._prepare_data(source, resumed)
        self.tokenizer = load_tokenizer(data_folder / "tokenizer")
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes)
        self.recipe = recipe = resolve_model(recipe, source, self.tokenizer.vocab_size)
        self.training_rows = self._rows(data_folder, "train")
        self.validation_rows = self._rows(data_folder, "validation")

        self.deepspeed_config = deepspeed_config(recipe, self.world.size)
        load = source.load if source and not resumed else None
        with naming_the_lever(recipe, self.world.size, building=True):
            model = build_model(recipe, load, self.deepspeed_config, self.device, self.context)
            self.model_config = model.config
            self.engine = build_engine(model, recipe, self.deepspeed_config)
        self.throughput = Throughput(self.model_config, recipe, self.device, self.world.size)

        self.step = self.tokens = self.rows = self.skipped_steps = self.nonfinite_in_a_row = 0
        self.saved_step = 0
        """Of the checkpoint that a resume would start from."""
        if resumed:
            self._resume(resumed)
        elif self.model_config.attention.routing_scale == "auto":
            with naming_the_lever(recipe, self.world.size):
                self._calibrate()
        if self.world.is_main:
            self._write_run_files()
            self._announce()

    def train(self) -> None:
        """Train to the last step; save, validate and draw along the way."""
        train, every = self.recipe.train, self.recipe.checkpoint.every
        tracker = Tracker(self.recipe, self.run_dir, self.step) if self.world.is_main else None
        profile = self.recipe.tracking.profile if self.world.is_main else None
        profiler = StepProfiler(profile, self.run_dir, self.device)
        batches = step_batches(
            rows_from(self.training_rows, self.rows),
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            rank=self.world.rank // self.context.size,
            world=self.readers,
        )
        self.stop.training = True
        with (
            closing(self.stop),
            closing(batches),
            closing(profiler),
            closing(tracker) if tracker else nullcontext(),
            self.watchdog,
            naming_the_lever(self.recipe, self.world.size),
            frozen_heap(),
        ):
            if self.step == 0:
                self.validate(tracker)
            while self.step < train.steps:
                router = self._router_gradients()
                with profiler.step(self.step + 1), router.watching() if router else nullcontext():
                    metrics = self.train_step(batches)
                metrics |= router.norms() if router else {}
                if tracker and (self.step % self.recipe.tracking.log_every == 0 or self.step == train.steps):
                    tracker.log_training(metrics)
                if self._due(train.validate_every) or self.step == train.steps:
                    self.validate(tracker)
                stopping = self._stop_agreed()
                # A step that was skipped is not saved; the next good one is.
                due = self.step // every > self.saved_step // every
                if due or self.step == train.steps or stopping:
                    self.save(tracker)
                if stopping:
                    logger.info("stopped by %s after step %d; run the same command to resume", stopping, self.step)
                    break
        if self.world.is_main:
            logger.info("figure: %s", plot_run(self.run_dir))
        release(self.run_dir)

    def train_step(self, batches: Iterator[StepBatch]) -> dict[str, Any]:
        """One optimizer step. The gradient is that of the mean loss over all counted tokens of the global batch."""
        enter = partial(self.watchdog.enter, self.step + 1)
        enter("loading data")
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        counts = [int((self.context.share(micro["labels"]) != IGNORE).sum()) for micro in batch.micro_batches]
        step_tokens = sum_over_ranks(torch.tensor(float(sum(counts)), device=self.device)).clamp(min=1)

        totals = Totals(self.model_config.layers, self.model_config.kv_heads, self.device)
        for micro, tokens in zip(batch.micro_batches, counts, strict=True):
            enter("forward")
            outputs = self.engine(**self._to_device(micro))
            # DeepSpeed averages gradients over the ranks; the loss is a sum over tokens.
            enter("backward")
            self.engine.backward(outputs["loss"] * (self.world.size / step_tokens), scale_wrt_gas=False)
            totals.add(outputs, tokens)
        enter("optimizer")
        lr = self.recipe.optimizer.lr * lr_factor(self.step, self.recipe.train.steps, self.recipe.schedule)
        set_lr(self.engine, lr)
        self.engine.step()
        totals.reduce()

        self.step += 1
        self.rows += self.recipe.train.global_batch_size
        counted = int(step_tokens.item())  # waits for the device: the step is done
        self.watchdog.arm()
        self.tokens += counted
        self._watch_nonfinite()
        layers = totals.per_layer()
        return {
            "step": self.step,
            "loss": totals.mean_loss,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": self.tokens,
            "epoch": batch.epoch,
            "rows_hash": crc32(repr(batch.rows).encode()),
            "skipped_steps": self.skipped_steps,
            "data_wait_seconds": waited,
            **self.throughput.measure(counted, time.perf_counter() - started, layers["routed_chunks"]),
            **layers,
        }

    @torch.no_grad()
    def validate(self, tracker: Tracker | None) -> None:
        """Loss, bits per byte and density on the held-out documents."""
        if not self.recipe.train.validate_every:
            return
        self.engine.eval()
        totals = Totals(self.model_config.layers, self.model_config.kv_heads, self.device)
        for micro in validation_batches(
            self.validation_rows,
            micro_batch_size=self.recipe.train.micro_batch_size,
            rank=self.world.rank // self.context.size,
            world=self.readers,
            limit_rows=self.recipe.train.validation_rows,
        ):
            self.watchdog.enter(self.step, "validation")
            labels = self.context.share(micro["labels"])
            labels = labels[labels != IGNORE]
            totals.add(self.engine(**self._to_device(micro)), labels.numel(), int(self.token_bytes[labels].sum()))
        totals.reduce()
        self.engine.train()
        if tracker:
            layers = {f"validation_{name}": values for name, values in totals.per_layer().items()}
            tracker.log_validation(
                {
                    "step": self.step,
                    "validation_loss": totals.mean_loss,
                    "validation_bits_per_byte": totals.bits_per_byte,
                    **layers,
                }
            )

    def save(self, tracker: Tracker | None) -> None:
        """Write a checkpoint of this step; not within a streak of skipped ones, whose weights may be those that fail,
        and which would push the good ones out."""
        if self.nonfinite_in_a_row:
            logger.warning("step %d: not saved, since its gradient was not finite; %s", self.step, self._way_back())
            return
        self.watchdog.enter(self.step, "checkpoint")
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            skipped_steps=self.skipped_steps,
            fingerprint=self.training_rows.fingerprint(),
            world=self.world.size,
            recipe=self.recipe.model_dump(mode="json", by_alias=True),
            rows=self.rows,
        )
        folder = self.run_dir / "checkpoints"
        saved = checkpoint.save(
            self.engine, self.world, folder, state, self.model_config, self.recipe.checkpoint.keep_last
        )
        self.saved_step = self.step
        if tracker:
            tracker.say(f"step {self.step}: saved {saved}")

    def _check_batch(self) -> None:
        train = self.recipe.train
        if train.global_batch_size % (train.micro_batch_size * self.readers):
            shared = f" over parallel.context ({self.context.size})" if self.context.size > 1 else ""
            raise UserError(
                f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
                f"({train.micro_batch_size}) times the number of ranks ({self.world.size}){shared}"
            )

    def _prepare_data(self, source: Source | None, resumed: Path | None) -> Path:
        """Tokenize on the main rank, once; the others wait. Fine-tuning keeps the tokenizer of its weights."""
        data = self.recipe.data
        if data.tokenizer.path is None and source is not None:
            # The same path as before, where it still exists, is the same text, tokenized already.
            before = checkpoint.load_state(resumed).recipe["data"]["tokenizer"]["path"] if resumed else None
            data.tokenizer.path = before if before and Path(before).exists() else str(source.tokenizer)
        from_main(self.world, lambda: prepare(data))
        return prepare(data)

    def _rows(self, data_folder: Path, split: str) -> RowDataset:
        data = self.recipe.data
        return RowDataset(
            data_folder,
            split,
            seq=self.recipe.train.seq,
            chunk_size=self.recipe.model.attention.chunk_size,
            weights=[source.weight for source in data.sources] if split == "train" else None,
            seed=data.seed,
        )

    def _resume(self, found: Path) -> None:
        state, saved_model = checkpoint.load_state(found), checkpoint.load_model_config(found)
        fingerprint = self.training_rows.fingerprint()
        check_resumable(found, state, saved_model, self.recipe, self.model_config, fingerprint, self.world.size)
        if self.model_config.attention.routing_scale == "auto":
            self.model_config.attention.routing_scale = saved_model.attention.routing_scale
            set_routing_scales(self.engine.module, self.model_config)
        checkpoint.load_engine(self.engine, found)
        self.step = self.saved_step = state.step
        self.tokens, self.rows, self.skipped_steps = state.tokens, state.rows, state.skipped_steps
        logger.info("resuming from %s", found)

    def _calibrate(self) -> None:
        """Settle `routing_scale: auto`. Every rank looks at the run's first rows, and so finds the same scales."""
        seq = self.recipe.train.seq
        at_once = max(1, CALIBRATION_BATCH // seq)
        count = math.ceil(calibration_rows(seq) / at_once)
        batches = step_batches(self.training_rows, global_batch_size=at_once, micro_batch_size=at_once, rank=0, world=1)
        with closing(batches):
            rows = [self._to_device(batch.micro_batches[0]) for batch in islice(batches, count)]
        scales = calibrate_routing_scale(self.engine.module, rows)
        logger.info("routing scales per layer: %s", ", ".join(f"{scale:.4g}" for scale in scales))

    def _router_gradients(self) -> RouterGradients | None:
        """What watches the next step, if it is one of those."""
        every = self.recipe.tracking.router_gradients_every
        return RouterGradients(self.engine.module, self.world) if every and (self.step + 1) % every == 0 else None

    def _watch_nonfinite(self) -> None:
        if self.engine.was_step_applied():
            self.nonfinite_in_a_row = 0
            return
        self.skipped_steps += 1
        self.nonfinite_in_a_row += 1
        logger.warning("step %d: the gradient is not finite; the step was skipped", self.step)
        if self.nonfinite_in_a_row >= self.recipe.train.max_nonfinite_steps:
            raise UserError(
                f"step {self.step}: {self.nonfinite_in_a_row} steps in a row had a non-finite gradient; lower "
                f"optimizer.lr or lengthen schedule.warmup_steps, and run again; {self._way_back()}"
            )

    def _way_back(self) -> str:
        good = self.step - self.nonfinite_in_a_row
        start = f"resumes from that of step {self.saved_step}" if self.saved_step else "starts from the beginning"
        return f"the last good step was {good}, and the same command {start}"

    def _stop_agreed(self) -> str | None:
        """The signal that any rank received, once all have agreed on it."""
        flag = torch.tensor(float(self.stop.received is not None), device=self.device)
        return (self.stop.received or "another rank's signal") if max_over_ranks(flag).item() else None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _announce(self) -> None:
        train, shared = self.recipe.train, self.context.size
        logger.info(
            "%s parameters; a step is %d rows of %d tokens: %d rank(s)%s x %d micro-batch(es) of %d; rows are %.1f %% "
            "full; step %d of %d",
            f"{self.throughput.parameters:,}",
            train.global_batch_size,
            train.seq,
            self.world.size,
            f", {shared} to a row," if shared > 1 else "",
            train.global_batch_size // (self.readers * train.micro_batch_size),
            train.micro_batch_size,
            100 * self.training_rows.fill(),
            self.step,
            train.steps,
        )

    def _write_run_files(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.recipe.save(self.run_dir / "recipe.yaml")
        (self.run_dir / "ds_config.json").write_text(json.dumps(self.deepspeed_config, indent=1) + "\n")
        self.tokenizer.save(self.run_dir / "tokenizer")
        write_environment(self.run_dir)
