"""The DeepSpeed engine of a recipe: its generated configuration, and the model under it."""

import difflib
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.recipe.values import merge
from dash_train.training.muon import Muon
from dash_train.training.optimizer import build_optimizer

# DeepSpeed's own keys that a recipe sets elsewhere.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
OWNED_ZERO = {
    "stage": "parallel.zero_stage",
    "offload_optimizer": "parallel.offload_optimizer",
    "offload_param": "parallel.offload_parameters",
}
# DeepSpeed's top-level keys that have no schema of its own and mean something to this trainer.
PLAIN_KEYS = (
    "communication_data_type",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
)


def deepspeed_config(recipe: Recipe, ranks: int = 1) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe for so many processes, its `deepspeed` section merged in.

    The trainer owns gradient accumulation: one `engine.step()` is one optimizer step whatever number of
    `engine.backward()` came before, so that the loss can be normalised by the tokens of the whole step.

    Raises:
        UserError: a key that DeepSpeed does not know (it would ignore it), or that the recipe sets elsewhere.
    """
    stage = recipe.parallel.zero_stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 clips in its own optimizer (optimizer.Guarded).
        "gradient_clipping": recipe.optimizer.grad_clip if stage else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # Overlapping makes the host wait for the device after every backward pass: a price for nothing on one rank.
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2 and ranks > 1,
            "contiguous_gradients": True,
        },
        "checkpoint": {"tag_validation": "Ignore"},
    }
    if recipe.train.precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if recipe.parallel.offload_optimizer == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # torch's fused AdamW is vectorised on the CPU, too; DeepSpeed's own would be compiled at first use.
        config["zero_force_ds_cpu_optimizer"] = False
    if recipe.parallel.offload_parameters == "cpu":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    if recipe.deepspeed:
        _check_keys(recipe.deepspeed)
        merge(config, recipe.deepspeed)
    return config


def build_engine(model: nn.Module, recipe: Recipe, config: dict[str, Any]) -> Any:
    """Wrap the model in a DeepSpeed engine with the recipe's optimizer. It gets no mpu: the ranks are ours."""
    import deepspeed

    optimizer = build_optimizer(model, recipe.optimizer, zero_stage=recipe.parallel.zero_stage)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if isinstance(optimizer, Muon) and recipe.parallel.zero_stage:
        optimizer.attach(engine)
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def grad_norm(engine: Any) -> float:
    """The global gradient norm of the last step, before clipping; inf when the step was skipped."""
    norm = engine.get_global_grad_norm()
    return norm.item() if isinstance(norm, torch.Tensor) else float(norm)


def _check_keys(section: dict[str, Any]) -> None:
    """Refuse keys that DeepSpeed would ignore, or that the recipe sets elsewhere."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    schemas = {"zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig}
    known = [*PLAIN_KEYS, *schemas]
    for key, value in section.items():
        if key in OWNED:
            raise UserError(f"deepspeed.{key}: set {OWNED[key]} in the recipe instead")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean deepspeed.{close[0]}?" if close else f"one of {', '.join(known)} was expected"
            raise UserError(f"deepspeed.{key}: unknown key; {hint}")
        if key in schemas:
            for owned in OWNED_ZERO.keys() & value if isinstance(value, dict) else ():
                raise UserError(f"deepspeed.{key}.{owned}: set {OWNED_ZERO[owned]} in the recipe instead")
            try:
                schemas[key].model_validate(value)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in (key, *first["loc"]))
                raise UserError(f"deepspeed.{place}: {first['msg']}") from error
