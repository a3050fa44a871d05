"""Pretraining and fine-tuning: a recipe in, a trained run folder out."""

import gc
import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from dash_train.data.loader import StepBatch, step_batches
from dash_train.data.rows import training_rows, validation_rows
from dash_train.distributed.agreement import check_agreement
from dash_train.distributed.rank_log import log_to_file
from dash_train.distributed.signals import StopFlag
from dash_train.distributed.slow_ranks import SlowRanks
from dash_train.distributed.watchdog import Watchdog
from dash_train.distributed.world import from_main, init_world, join_context, max_over_ranks
from dash_train.errors import UserError
from dash_train.model.rows import Watch
from dash_train.recipe.schema import Recipe
from dash_train.tracking.tracker import Tracker, check_tensorboard, check_wandb
from dash_train.training import checkpoint, out_of_memory
from dash_train.training.calibrate import calibrate
from dash_train.training.density import steer
from dash_train.training.ema import EMA, Ema
from dash_train.training.engine import build_engine, deepspeed_config, grad_norm, set_lr
from dash_train.training.garbage import frozen_heap
from dash_train.training.initial import build_model, resolve_model
from dash_train.training.model_state import steps_taken
from dash_train.training.profiler import StepProfiler
from dash_train.training.progress import Progress
from dash_train.training.restore import load_checkpoint, load_ema, take_scales, take_up
from dash_train.training.resume import check_fit, check_recipe
from dash_train.training.router_gradients import RouterGradients
from dash_train.training.router_warmup import RouterWarmup
from dash_train.training.rows import hash_of, rows_from
from dash_train.training.run_data import open_data
from dash_train.training.run_files import announce, draw, write_run_files
from dash_train.training.run_folder import claim, nothing_left_of_a_refusal, release
from dash_train.training.saving import Saver
from dash_train.training.schedule import lr_factor
from dash_train.training.spikes import SpikeWatch
from dash_train.training.start import Start, find_start
from dash_train.training.step import optimizer_step
from dash_train.training.throughput import Throughput
from dash_train.training.totals import Totals
from dash_train.training.validation import Validation

MOST_ROLLBACKS = 3  # to the same checkpoint

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, stage after stage, or until it is stopped."""
    with closing(StopFlag()) as stop:
        more = True
        while more:
            trainer = Trainer(recipe, stop)
            more = trainer.train()
            trainer.engine.destroy()
            del trainer
            gc.collect()  # an engine is full of circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Trainer:
    """Everything one rank holds during a run, or during one of its stages. `train()` is the run."""

    def __init__(self, recipe: Recipe, stop: StopFlag | None = None) -> None:
        self.whole = recipe
        self.run_dir = Path(recipe.run_dir)
        self.stop, self._closes_stop = stop or StopFlag(), stop is None
        self.stop.training = False
        self.world = init_world()
        self.device = self.world.device
        self.watchdog = Watchdog(self.world, recipe.parallel.timeout_seconds)
        with self.watchdog.explaining(), nothing_left_of_a_refusal(self.run_dir, self.world):
            self.watchdog.begin("comparing the ranks")
            check_agreement(recipe)
            claim(self.run_dir, self.world)
            self.watchdog.log = log_to_file(self.run_dir, self.world)
            self.watchdog.begin("reading the checkpoint", limit=math.inf)
            self._set_up(find_start(recipe, self.world))

    @property
    def step(self) -> int:
        return self.progress.step

    def _set_up(self, start: Start) -> None:
        """Ranks, text, model, engine, and the state of the checkpoint that is gone on from."""
        recipe, self.stage = start.recipe, start.stage
        self.context = join_context(self.world, recipe.parallel)
        self.readers = self.world.size // self.context.size  # data-parallel ranks
        self.micro_batches = recipe.train.micro_batches(self.world.size, self.context.size)
        check_tensorboard(recipe)
        from_main(self.world, lambda: check_wandb(recipe))
        self._open_text(start)
        self._build(start)
        recipe = self.recipe
        self.saver = Saver(self.world, self.run_dir / "checkpoints", recipe.checkpoint)
        self.saved_step = self.step if start.resumes or start.stage else 0
        """Step of the checkpoint that a resume would start from."""
        self.spikes = SpikeWatch(recipe.train.spike_threshold)
        self.rollbacks: Counter[int] = Counter()
        self.slow_ranks = SlowRanks(self.world, recipe.tracking.compare_ranks_every)
        if self.world.is_main:
            kept = self.whole if self.whole.stages else recipe
            write_run_files(self.run_dir, kept, self.deepspeed_config, self.tokenizer)
            announce(recipe, self.whole.train.steps, self.step, self.throughput.parameters, self.training_rows)

    def _open_text(self, start: Start) -> None:
        """The rows, and the recipe with what depends on the text settled: tokenizer and model."""
        recipe = start.recipe
        if start.state and start.checkpoint and (start.resumes or start.stage):
            check_recipe(start.checkpoint, start.state, recipe, self.world.size)
        self.watchdog.begin("preparing the data", limit=math.inf)
        data = open_data(start, self.world)
        self.data_folder, self.tokenizer = data.folder, data.tokenizer
        recipe = recipe.model_copy(update={"data": data.config})
        self.recipe = recipe = resolve_model(recipe, start.source, self.tokenizer.vocab_size)
        cut = {"seq": recipe.train.seq, "chunk_size": recipe.model.attention.chunk_size}
        self.training_rows = training_rows(
            data.config, data.folder, global_batch_size=recipe.train.global_batch_size, **cut
        )
        held_out = validation_rows(data.folder, seed=data.config.seed, **cut)
        self.validation = Validation(held_out, self.tokenizer, recipe.train)
        if start.checkpoint:
            check_fit(start, recipe, self.training_rows)

    def _build(self, start: Start) -> None:
        """Model and engine, with the weights that the run starts from and what goes on with them."""
        recipe = self.recipe
        self.watchdog.begin("building the model")
        self.deepspeed_config = deepspeed_config(recipe, self.world.size)
        load = start.source.load if start.source and not start.checkpoint else None
        with out_of_memory.explain(recipe, self.world.size, building=True):
            model = build_model(recipe, load, self.deepspeed_config, self.device, self.context)
            self.model_config = model.config
            self.engine = build_engine(model, recipe, self.deepspeed_config)
        self.throughput = Throughput(self.model_config, recipe, self.device, self.world.size)
        self.progress = Progress(source_tokens=[0] * len(self.training_rows.shards.meta.sources))
        if start.checkpoint:
            self.watchdog.begin("loading the checkpoint", limit=math.inf)
            take_up(start, self.engine, recipe, self.progress)
        self.watchdog.begin("preparing the first step")
        settle = partial(calibrate, self.engine.module, self.training_rows, self.device)
        if self.model_config.attention.routing_scale == "auto":
            with out_of_memory.explain(recipe, self.world.size):
                settle()
        # As the recipe was written: what it stands on has settled scales.
        auto = start.recipe.model.attention.routing_scale == "auto"
        self.router_warmup = RouterWarmup(self.engine.module, settle if auto else None)
        self.router_warmup.settle(self.step)
        self.ema = Ema(self.engine, recipe.optimizer.ema) if recipe.optimizer.ema else None
        if self.ema and start.checkpoint and "optimizer" in start.keep:
            load_ema(self.ema, start.checkpoint)

    def train(self) -> bool:
        """Train to the last step of the stage; save, validate and draw along the way. Whether another stage follows."""
        train = self.recipe.train
        tracker = Tracker(self.recipe, self.run_dir, self.step) if self.world.is_main else None
        profile = self.recipe.tracking.profile if self.world.is_main else None
        profiler = StepProfiler(profile, self.run_dir, self.device)
        self.stop.training, stopping = True, None
        with (
            closing(self.stop) if self._closes_stop else nullcontext(),
            closing(profiler),
            closing(self.saver),
            closing(tracker) if tracker else nullcontext(),
            closing(self.watchdog),
            self.watchdog.explaining(),
            out_of_memory.explain(self.recipe, self.world.size),
            frozen_heap(),
        ):
            batches = self._batches()
            try:
                if self.step == 0:
                    self.validate(tracker)
                while self.step < train.steps and not stopping:
                    if train.skips(self.step + 1):
                        self._skip_step(batches, tracker)
                    else:
                        router = self._router_gradients()
                        with profiler.step(self.step + 1):
                            metrics = self.train_step(batches, router.watch if router else None)
                        metrics |= router.norms() if router else {}
                        if tracker and (self.step % self.recipe.tracking.log_every == 0 or self.step == train.steps):
                            tracker.log_training(metrics)
                        if self._is_off(metrics["loss"]) and self._roll_back(tracker):
                            batches.close()
                            batches = self._batches()
                    if self._due(train.validate_every) or self.step == train.steps:
                        self.validate(tracker)
                    stopping = self._agree()
                    if self._save_due() or self.step == train.steps or stopping:
                        self.save()
                self._finish_saving()
                if tracker:
                    draw(self.run_dir, tracker, self.step)
            finally:
                batches.close()
        if stopping:
            logger.info("stopped by %s after step %d; run the same command to resume", stopping, self.step)
        release(self.run_dir)
        return not stopping and self.step < self.whole.train.steps

    def train_step(self, batches: Iterator[StepBatch], watch: Watch | None = None) -> dict[str, Any]:
        """One optimizer step on the next batch, and its line of metrics."""
        enter = partial(self.watchdog.enter, self.step + 1)
        enter("loading data")
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        schedule = self.recipe.schedule
        lr = self.recipe.optimizer.lr * lr_factor(self.step, schedule.steps or self.recipe.train.steps, schedule)
        set_lr(self.engine, lr)
        totals = Totals(self.model_config.layers, self.model_config.kv_heads, self.device)
        step_tokens = optimizer_step(self.engine, batch.micro_batches, self.world, self.context, totals, enter, watch)
        totals.reduce()

        counted = int(step_tokens.item())  # waits for the device: the step is done
        self.watchdog.arm()
        self.slow_ranks.step(waited)
        self.progress.take(batch, counted)
        self._watch_nonfinite()
        if self.ema and not self.progress.nonfinite_in_a_row:
            self.ema.update()
        layers = totals.per_layer()
        router_error = self.router_warmup.error()
        self.router_warmup.settle(self.step)
        steer(self.engine.module, self.model_config, self.step - 1, layers["density"])
        return {
            "step": self.step,
            "loss": totals.mean_loss,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": self.progress.tokens,
            "epoch": batch.epoch,
            "rows_hash": hash_of(batch.rows),
            **self.progress.by_source(self.training_rows.shards.meta.sources),
            "skipped_steps": self.progress.skipped_steps,
            "data_wait_seconds": waited,
            **self.throughput.measure(counted, time.perf_counter() - started, layers["routed_chunks"]),
            **self.saver.stall(),
            **layers,
            **router_error,
        }

    def validate(self, tracker: Tracker | None) -> None:
        """Loss, bits per byte and density on the held-out documents; of several sources, also the loss of each."""
        if not self.recipe.train.validate_every:
            return
        place = (self.model_config, self.world, self.context, partial(self.watchdog.enter, self.step, "validation"))
        values = self.validation.run(self.engine, *place)
        self.progress.validation_loss = values["validation_loss"]
        if tracker:
            tracker.log_validation({"step": self.step, **values})

    def save(self) -> None:
        """Begin a checkpoint of this step; not within a streak of skipped ones, whose weights may be those that fail,
        and which would push the good ones out."""
        if self.progress.nonfinite_in_a_row:
            logger.warning("step %d: not saved, since its gradient was not finite; %s", self.step, self._way_back())
            return
        self.watchdog.enter(self.step, "checkpoint")
        state = self.progress.state(
            fingerprint=self.training_rows.fingerprint(self.progress.rows),
            world=self.world.size,
            recipe=self.recipe.model_dump(mode="json", by_alias=True),
            optimizer_steps=steps_taken(self.engine),
            stage=self.stage,
            data=str(self.data_folder.absolute()),
        )
        self.saver.save(self.engine, state, self.model_config, {EMA: self.ema.averages} if self.ema else {})
        self.saved_step = self.step

    def _finish_saving(self) -> None:
        self.watchdog.enter(self.step, "checkpoint")
        self.saver.finish()

    def _batches(self) -> Generator[StepBatch, None, None]:
        """The batches of the steps that come next."""
        return step_batches(
            rows_from(self.training_rows, self.progress.rows),
            global_batch_size=self.recipe.train.global_batch_size,
            micro_batch_size=self.recipe.train.micro_batch_size,
            rank=self.world.rank // self.context.size,
            world=self.readers,
        )

    def _skip_step(self, batches: Iterator[StepBatch], tracker: Tracker | None) -> None:
        """Pass over a step of `train.skip_steps`: its rows are read and left."""
        self.watchdog.enter(self.step + 1, "loading data")
        batch = next(batches)
        self.progress.pass_over(batch)
        if tracker:
            tracker.log_skipped({"step": self.step, "skipped_by_recipe": True, "rows_hash": hash_of(batch.rows)})

    def _router_gradients(self) -> RouterGradients | None:
        """What watches the next step, if it is one of those."""
        every = self.recipe.tracking.router_gradients_every
        return RouterGradients(self.engine.module, self.world) if every and (self.step + 1) % every == 0 else None

    def _watch_nonfinite(self) -> None:
        progress = self.progress
        if self.engine.was_step_applied():
            progress.nonfinite_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.nonfinite_in_a_row += 1
        logger.warning("step %d: the gradient is not finite; the step was skipped", self.step)
        rolls_back = self.recipe.train.on_spike == "rollback" and self.saved_step
        if progress.nonfinite_in_a_row >= self.recipe.train.max_nonfinite_steps and not rolls_back:
            self._finish_saving()
            raise UserError(
                f"step {self.step}: {progress.nonfinite_in_a_row} steps in a row had a non-finite gradient; lower "
                f"optimizer.lr or lengthen schedule.warmup_steps, and run again; {self._way_back()}"
            )

    def _is_off(self, loss: float) -> bool:
        """Whether the step just taken is one to go back behind; a spike is warned of."""
        train = self.recipe.train
        if train.on_spike == "ignore":
            return False
        if self.spikes.is_spike(loss):
            logger.warning("step %d: the loss, %.4f, is a spike (train.on_spike: %s)", self.step, loss, train.on_spike)
            return train.on_spike == "rollback"
        return self.progress.nonfinite_in_a_row >= train.max_nonfinite_steps

    def _roll_back(self, tracker: Tracker | None) -> bool:
        """Go back to the last checkpoint, but not to its rows: those from there to here are left out. Whether there was
        one to go back to.

        Raises:
            UserError: it has been gone back to too often.
        """
        self._finish_saving()
        found = checkpoint.newest(self.run_dir / "checkpoints", self.world)
        if found is None:
            logger.warning("step %d: no checkpoint to roll back to yet", self.step)
            return False
        state, at, rows = checkpoint.load_state(found), self.step, self.progress.rows
        self.rollbacks[state.step] += 1
        if self.rollbacks[state.step] > MOST_ROLLBACKS:
            raise UserError(
                f"step {at}: rolled back to step {state.step} {MOST_ROLLBACKS} times, and the loss leaves its course "
                "again; lower optimizer.lr, or set train.on_spike to warn, and run again"
            )
        load_checkpoint(self.engine, found, state, moments=True)
        take_scales(self.engine.module, checkpoint.load_model_config(found))
        if self.ema:
            load_ema(self.ema, found)
        self.progress = Progress(source_tokens=self.progress.source_tokens)
        self.progress.go_on_from(state, self.recipe.train.seq, ("optimizer", "schedule", "data"))
        left_out, self.progress.rows = [self.progress.rows, rows], rows
        logger.warning("rolled back from step %d to step %d; rows %d to %d are left out", at, self.step, *left_out)
        if tracker:
            tracker.log_event({"step": self.step, "rolled_back_from": at, "rows_left_out": left_out})
        return True

    def _way_back(self) -> str:
        good = self.step - self.progress.nonfinite_in_a_row
        start = f"resumes from that of step {self.saved_step}" if self.saved_step else "starts from the beginning"
        return f"the last good step was {good}, and the same command {start}"

    def _agree(self) -> str | None:
        """What stops the run, once all ranks have agreed on it; and a checkpoint that all have written is published."""
        limit, self_stopped = self.recipe.train.time_limit, self.stop.received
        if limit and time.time() - psutil.Process().create_time() > limit:
            self_stopped = self_stopped or "train.time_limit"
        flags = torch.tensor([float(self_stopped is not None), float(self.saver.writing)], device=self.device)
        stopping, writing = max_over_ranks(flags).tolist()
        if self.saver.pending and not writing:
            self._finish_saving()
        return (self_stopped or "another rank's signal") if stopping else None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _save_due(self) -> bool:
        """A step that was skipped is not saved; the next good one is."""
        every = self.recipe.checkpoint.every
        return self.step // every > self.saved_step // every
