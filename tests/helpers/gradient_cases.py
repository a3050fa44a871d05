"""Gradients of the trainer on several ranks against those of plain PyTorch on one: what the ranks of a test run."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ranks import run_on_ranks
from tiny_runs import write_recipe
from torch import Tensor

from dash_train.data.loader import IGNORE, StepBatch, step_batches

STEPS = 2
ATTENTION: dict[str, dict[str, Any]] = {
    "dash": {"type": "dash"},
    # A window that is larger than its block, and at context 4 nearly a rank's piece; and the recipes' blocks.
    "blocks": {"type": "dash", "routing_block": [1, 16], "routing_window": [30, 16]},
    "full": {"type": "full"},
}


@dataclass(frozen=True)
class Case:
    """One engine. `savings` are what a long row needs: blocks computed again, or loss and MLP in pieces."""

    stage: int
    context: int = 1
    accumulation: int = 1
    savings: str = "checkpointed"
    attention: str = "dash"
    method: str = "gather"
    routing_scale: Any = 500.0


def _product(contexts: tuple[int, ...], methods: tuple[str, ...]) -> list[Case]:
    values = ((0, 1, 2, 3), contexts, (1, 2), ("checkpointed", "chunked"), tuple(ATTENTION), methods)
    return [Case(*chosen) for chosen in itertools.product(*values)]


WHOLE_PRODUCT = {
    2: _product((1,), ("gather",)) + _product((2,), ("gather", "ulysses")),
    4: _product((2, 4), ("gather", "ulysses")),  # context 2 beside two data-parallel ranks
}


def worst_errors(ranks: int, cases: list[Case], corpus: Path, folder: Path) -> list[dict[str, Any]]:
    """Run the cases one after the other on `ranks` processes; each comes back with what it got wrong, relatively."""
    run_on_ranks(ranks, _compare_all, ranks, cases, corpus, folder)
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


def _compare_all(rank: int, ranks: int, cases: list[Case], corpus: Path, folder: Path) -> None:
    for number, case in enumerate(cases):
        errors = _compare(case, rank, ranks, corpus, folder / str(number))
        if rank == 0:
            with (folder / "errors.jsonl").open("a") as file:
                file.write(json.dumps({**asdict(case), "errors": errors}) + "\n")


def _compare(case: Case, rank: int, ranks: int, corpus: Path, folder: Path) -> dict[str, float]:
    from dash_train.model import loss, transformer
    from dash_train.recipe.load import load_recipe
    from dash_train.training.trainer import Trainer

    micro = 2
    rows = micro * case.accumulation * ranks // case.context
    attention = {**ATTENTION[case.attention], "chunk_size": 16, "routing_scale": case.routing_scale}
    chunked = case.savings == "chunked"
    transformer.MLP_TOKENS, loss.CHUNK_LOGITS = (24, 40 * 512) if chunked else (131072, 2**27)
    path = write_recipe(
        folder / f"recipe-{rank}.yaml",
        corpus,
        model={
            "layers": 2, "hidden_size": 32, "heads": 8, "kv_heads": 4, "head_dim": 16, "mlp_size": 64,
            "attention": attention,
        },
        train={
            "steps": STEPS, "seq": 256, "micro_batch_size": micro, "global_batch_size": rows, "precision": "fp32",
            "activation_checkpointing": "none" if chunked else "full", "validate_every": 0,
        },
        optimizer={"lr": 1e-3, "grad_clip": 0.5},
        parallel={"zero_stage": case.stage, "context": case.context, "context_method": case.method},
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if case.stage == 3 else {},
    )  # fmt: skip
    trainer = Trainer(load_recipe(path))
    batches = step_batches(
        trainer.training_rows,
        global_batch_size=rows,
        micro_batch_size=micro,
        rank=rank // case.context,
        world=ranks // case.context,
    )
    lines = []
    for _ in range(STEPS):
        lines.append(trainer.train_step(_uneven(batches)))
        if len(lines) == 1:
            moments = _first_moments(trainer.engine, case.stage)  # now a tenth of the gradient, clipped
    batches.close()
    gradients, expected = _plain_training(trainer)
    assert max(line["grad_norm"] for line in expected) > 0.5, "clipping must have been at work"
    errors = {
        key: max(_relative(torch.tensor(a[key]), torch.tensor(b[key])) for a, b in zip(lines, expected, strict=True))
        for key in expected[0]
    }
    errors["gradient"] = max(_relative(10 * moments[name], gradient) for name, gradient in gradients.items())
    return errors


def _first_moments(engine: Any, stage: int) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    parameters = dict(engine.module.named_parameters())
    if stage == 0:
        return {name: engine.optimizer.state[parameter]["exp_avg"].clone() for name, parameter in parameters.items()}
    if stage < 3:  # DeepSpeed looks for the moments when the first of the groups has made its step, and finds no others
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {name: safe_get_full_optimizer_state(parameter, "exp_avg") for name, parameter in parameters.items()}


def _plain_training(trainer: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The first step's clipped gradients, and the metrics of all steps: one process, whole batches at once."""
    from dash_train.model.transformer import LanguageModel
    from dash_train.training.optimizer import parameter_groups
    from dash_train.training.schedule import lr_factor

    recipe = trainer.recipe
    torch.manual_seed(recipe.train.seed)
    model = LanguageModel(trainer.model_config)
    options = recipe.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), betas=options.betas, eps=options.eps)
    size = recipe.train.global_batch_size
    batches = step_batches(trainer.training_rows, global_batch_size=size, micro_batch_size=size, rank=0, world=1)
    gradients, lines = {}, []
    for step, batch in zip(range(STEPS), _uneven(batches), strict=False):
        (rows,) = batch.micro_batches
        outputs = model(**rows)
        loss = outputs["loss"] / (rows["labels"] != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(step, recipe.train.steps, recipe.schedule)
        optimizer.step()
        density = outputs["active_chunks"] / outputs["eligible_chunks"].clamp(min=1)
        lines.append({"loss": loss.item(), "grad_norm": norm.item()})
        if outputs["eligible_chunks"].sum():
            lines[-1]["density"] = density.tolist()
    batches.close()
    return gradients, lines


def _uneven(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """Take labels away, by what the rows hold, so that some ranks count many tokens and some none."""
    for batch in batches:
        micro_batches = []
        for micro in batch.micro_batches:
            labels = micro["labels"].masked_fill(micro["tokens"] % 3 == 0, IGNORE)
            half = labels.shape[1] // 2
            few = micro["tokens"][:, 5] % 2 == 0
            labels[few, :half] = IGNORE
            micro_batches.append({**micro, "labels": labels})
        yield replace(batch, micro_batches=micro_batches)


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest number that was expected."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
