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

from dash_train.data.config import DataConfig
from dash_train.data.loader import IGNORE, RowDataset, StepBatch, step_batches, validation_batches
from dash_train.data.prepare import prepare
from dash_train.data.rows import by_source, training_rows, unique_names, validation_rows
from dash_train.data.tokenizer import load_tokenizer
from dash_train.distributed.agreement import check_agreement
from dash_train.distributed.rank_log import log_to_file
from dash_train.distributed.signals import StopFlag
from dash_train.distributed.watchdog import Watchdog
from dash_train.distributed.world import from_main, init_world, join_context, max_over_ranks
from dash_train.errors import UserError
from dash_train.model.calibration import calibrate_routing_scale, set_routing_scales
from dash_train.recipe.schema import Recipe
from dash_train.tracking.environment import write_environment
from dash_train.tracking.plot import plot_run
from dash_train.tracking.tracker import Tracker, check_wandb
from dash_train.training import checkpoint, out_of_memory
from dash_train.training.checkpoint import TrainState
from dash_train.training.engine import build_engine, deepspeed_config, grad_norm, set_lr
from dash_train.training.garbage import frozen_heap
from dash_train.training.initial import Source, build_model, open_source, resolve_model
from dash_train.training.profiler import StepProfiler
from dash_train.training.resume import check_resumable
from dash_train.training.router_gradients import RouterGradients
from dash_train.training.rows import rows_from
from dash_train.training.run_folder import claim, nothing_left_of_a_refusal, release
from dash_train.training.schedule import lr_factor
from dash_train.training.step import optimizer_step, to_device
from dash_train.training.throughput import Throughput
from dash_train.training.totals import Totals

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
        self.micro_batches = recipe.train.micro_batches(self.world.size, self.context.size)
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
        data = self._data_config(source, resumed)
        data_folder = self._prepare(data)
        self.tokenizer = load_tokenizer(data_folder / "tokenizer")
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes)
        recipe = recipe.model_copy(update={"data": data})
        self.recipe = recipe = resolve_model(recipe, source, self.tokenizer.vocab_size)
        cut = {"seq": recipe.train.seq, "chunk_size": recipe.model.attention.chunk_size}
        self.training_rows = training_rows(data, data_folder, global_batch_size=recipe.train.global_batch_size, **cut)
        self.validation_rows = validation_rows(data_folder, seed=data.seed, **cut)
        sources = by_source(self.validation_rows)
        self.validation_sources = sources if len(sources) > 1 else {}
        self.source_tokens = [0] * len(self.training_rows.shards.meta.sources)

        self.deepspeed_config = deepspeed_config(recipe, self.world.size)
        load = source.load if source and not resumed else None
        with out_of_memory.explain(recipe, self.world.size, building=True):
            model = build_model(recipe, load, self.deepspeed_config, self.device, self.context)
            self.model_config = model.config
            self.engine = build_engine(model, recipe, self.deepspeed_config)
        self.throughput = Throughput(self.model_config, recipe, self.device, self.world.size)

        self.step = self.tokens = self.rows = self.skipped_steps = self.nonfinite_in_a_row = 0
        self.saved_step = 0
        """Step of the checkpoint that a resume would start from."""
        if resumed:
            self._resume(resumed)
        elif self.model_config.attention.routing_scale == "auto":
            with out_of_memory.explain(recipe, self.world.size):
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
            out_of_memory.explain(self.recipe, self.world.size),
            frozen_heap(),
        ):
            if self.step == 0:
                self.validate(tracker)
            while self.step < train.steps:
                if train.skips(self.step + 1):
                    self._skip_step(batches, tracker)
                else:
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
        """One optimizer step on the next batch, and its line of metrics."""
        enter = partial(self.watchdog.enter, self.step + 1)
        enter("loading data")
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        lr = self.recipe.optimizer.lr * lr_factor(self.step, self.recipe.train.steps, self.recipe.schedule)
        set_lr(self.engine, lr)
        totals = Totals(self.model_config.layers, self.model_config.kv_heads, self.device)
        step_tokens = optimizer_step(self.engine, batch.micro_batches, self.world, self.context, totals, enter)
        totals.reduce()

        self.step += 1
        self.rows += self.recipe.train.global_batch_size
        counted = int(step_tokens.item())  # waits for the device: the step is done
        self.watchdog.arm()
        self.tokens += counted
        if self.source_tokens:
            self.source_tokens = [a + b for a, b in zip(self.source_tokens, batch.source_tokens, strict=True)]
        self._watch_nonfinite()
        layers = totals.per_layer()
        return {
            "step": self.step,
            "loss": totals.mean_loss,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": self.tokens,
            "epoch": batch.epoch,
            "rows_hash": _hash(batch.rows),
            **self._tokens_by_source(),
            "skipped_steps": self.skipped_steps,
            "data_wait_seconds": waited,
            **self.throughput.measure(counted, time.perf_counter() - started, layers["routed_chunks"]),
            **layers,
        }

    def _skip_step(self, batches: Iterator[StepBatch], tracker: Tracker | None) -> None:
        """Pass over a step of `train.skip_steps`: its rows are read and left."""
        self.watchdog.enter(self.step + 1, "loading data")
        batch = next(batches)
        self.step += 1
        self.rows += self.recipe.train.global_batch_size
        if tracker:
            tracker.log_skipped({"step": self.step, "skipped_by_recipe": True, "rows_hash": _hash(batch.rows)})

    def _tokens_by_source(self) -> dict[str, dict[str, int]]:
        """`tokens` for each source, where there are several; not in a run whose beginning did not count them."""
        names = unique_names(self.training_rows.shards.meta.sources)
        if len(names) == 1 or not self.source_tokens:
            return {}
        return {"source_tokens": dict(zip(names, self.source_tokens, strict=True))}

    @torch.no_grad()
    def validate(self, tracker: Tracker | None) -> None:
        """Loss, bits per byte and density on the held-out documents; of several sources, also the loss of each."""
        train = self.recipe.train
        if not train.validate_every:
            return
        self.engine.eval()
        totals = self._validation_totals(self.validation_rows, train.validation_rows)
        rows = math.ceil(train.validation_rows / max(1, len(self.validation_sources)))
        of_sources = {name: self._validation_totals(of, rows) for name, of in self.validation_sources.items()}
        self.engine.train()
        if tracker:
            values: dict[str, Any] = {
                "step": self.step,
                "validation_loss": totals.mean_loss,
                "validation_bits_per_byte": totals.bits_per_byte,
            }
            if of_sources:
                values["source_validation_loss"] = {name: t.mean_loss for name, t in of_sources.items()}
                values["source_validation_bits_per_byte"] = {name: t.bits_per_byte for name, t in of_sources.items()}
            layers = {f"validation_{name}": per_layer for name, per_layer in totals.per_layer().items()}
            tracker.log_validation({**values, **layers})

    def _validation_totals(self, dataset: RowDataset, limit_rows: int) -> Totals:
        totals = Totals(self.model_config.layers, self.model_config.kv_heads, self.device)
        for micro in validation_batches(
            dataset,
            micro_batch_size=self.recipe.train.micro_batch_size,
            rank=self.world.rank // self.context.size,
            world=self.readers,
            limit_rows=limit_rows,
        ):
            self.watchdog.enter(self.step, "validation")
            labels = self.context.share(micro["labels"])
            labels = labels[labels != IGNORE]
            outputs = self.engine(**to_device(micro, self.device))
            totals.add(outputs, labels.numel(), int(self.token_bytes[labels].sum()))
        totals.reduce()
        return totals

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
            fingerprint=self.training_rows.fingerprint(self.rows),
            world=self.world.size,
            recipe=self.recipe.model_dump(mode="json", by_alias=True),
            rows=self.rows,
            source_tokens=self.source_tokens or None,
        )
        folder = self.run_dir / "checkpoints"
        saved = checkpoint.save(
            self.engine, self.world, folder, state, self.model_config, self.recipe.checkpoint.keep_last
        )
        self.saved_step = self.step
        if tracker:
            tracker.say(f"step {self.step}: saved {saved}")

    def _data_config(self, source: Source | None, resumed: Path | None) -> DataConfig:
        """The recipe's, but that fine-tuning keeps the tokenizer of its weights."""
        data = self.recipe.data
        if data.tokenizer.path is not None or source is None:
            return data
        # The same path as before, where it still exists, is the same text, tokenized already.
        before = checkpoint.load_state(resumed).recipe["data"]["tokenizer"]["path"] if resumed else None
        path = before if before and Path(before).exists() else str(source.tokenizer)
        return data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"path": path})})

    def _prepare(self, data: DataConfig) -> Path:
        """Tokenize on the main rank, once; the others wait."""
        from_main(self.world, lambda: prepare(data))
        return prepare(data)

    def _resume(self, found: Path) -> None:
        state, saved_model = checkpoint.load_state(found), checkpoint.load_model_config(found)
        fingerprint = self.training_rows.fingerprint(state.rows)
        check_resumable(found, state, saved_model, self.recipe, self.model_config, fingerprint, self.world.size)
        if self.model_config.attention.routing_scale == "auto":
            self.model_config.attention.routing_scale = saved_model.attention.routing_scale
            set_routing_scales(self.engine.module, self.model_config)
        checkpoint.load_engine(self.engine, found)
        self.step = self.saved_step = state.step
        self.tokens, self.rows, self.skipped_steps = state.tokens, state.rows, state.skipped_steps
        self.source_tokens = state.source_tokens or []
        logger.info("resuming from %s", found)

    def _calibrate(self) -> None:
        """Settle `routing_scale: auto`. Every rank looks at the run's first rows, and so finds the same scales."""
        seq = self.recipe.train.seq
        at_once = max(1, CALIBRATION_BATCH // seq)
        count = math.ceil(calibration_rows(seq) / at_once)
        batches = step_batches(self.training_rows, global_batch_size=at_once, micro_batch_size=at_once, rank=0, world=1)
        with closing(batches):
            rows = [to_device(batch.micro_batches[0], self.device) for batch in islice(batches, count)]
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
            self.micro_batches,
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


def _hash(rows: list[int]) -> int:
    """A number by which to see that two steps held the same rows."""
    return crc32(repr(rows).encode())
