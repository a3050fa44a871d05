"""Checkpoints of version 0.1, which are DeepSpeed's own: its pickles, one or two a rank.

They are read, never written: resumed by as many ranks on the same stage and in the same precision; their weights are
gathered.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dash_train.errors import UserError

FORMAT = 1
MODEL_STATES = "mp_rank_00_model_states.pt"
BF16_SHARD = "bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer state into the engine; what the recipe says of the optimizer (weight decay, betas,
    clipping, ...) stays as it is, where DeepSpeed would take the checkpoint's."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    with tensors_only():
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)
    if clip is not None:
        engine.optimizer.clip_grad = clip


@contextmanager
def tensors_only() -> Iterator[None]:
    """Whatever is unpickled in here, by DeepSpeed too, is made of tensors, plain values and three plain classes of
    DeepSpeed's: a file that would run code is refused, whoever wrote it and its hash."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    load = torch.load

    def load_tensors(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(file, *args, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "it is no file of torch.save")
            raise UserError(
                f"{file}: expected tensors alone, as this trainer writes them ({what.strip()}); the file is damaged or "
                "hostile: do not open it by other means"
            ) from error

    torch.load = load_tensors  # type: ignore[assignment]
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        torch.load = load


def load_weights(checkpoint: Path, recipe: dict[str, Any], ranks: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint that so many ranks have written, on the CPU."""
    with tensors_only():
        parallel, is_bf16 = recipe["parallel"], recipe["train"]["precision"] == "bf16"
        if parallel["zero_stage"] == 0:
            return _load_shard(checkpoint / MODEL_STATES)["module"]
        if parallel["zero_stage"] == 1 and is_bf16 and parallel["offload_optimizer"] == "none":
            return _weights_of_bf16_shards(checkpoint, ranks)
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        return {name: weight.detach().clone() for name, weight in weights.items()}


def missing_shard(files: list[str], recipe: dict[str, Any], ranks: int) -> str | None:
    """A shard that such a checkpoint has and the files lack."""
    stage = recipe["parallel"]["zero_stage"]
    kinds = ["optim_states"] if stage else []
    kinds += ["model_states"] if stage == 3 else []
    for rank in range(ranks):
        for kind in kinds:
            ending = f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
            if not any(name.endswith(ending) for name in files):
                return ending
    return None if stage == 3 or MODEL_STATES in files else MODEL_STATES


def _weights_of_bf16_shards(checkpoint: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Stage 1 in bf16 is DeepSpeed's BF16_Optimizer, whose checkpoints its own zero_to_fp32 refuses.

    A rank's shard holds, for each parameter group, a flat tensor of fp32 weights and where in it lies the rank's part
    of each parameter; the parts of a parameter follow each other by rank.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(ranks):
        shard = _load_shard(checkpoint / BF16_SHARD.format(rank=rank))["optimizer_state_dict"]
        groups = zip(shard["param_slice_mappings"], shard["single_partition_of_fp32_groups"], strict=True)
        for places, flat in groups:
            for name, place in places.items():
                parts.setdefault(name, []).append(flat.detach()[place.start : place.start + place.numel])
    module = _load_shard(checkpoint / MODEL_STATES)["module"]
    whole = {module[name].data_ptr(): torch.cat(found).view_as(module[name]) for name, found in parts.items()}
    return {name: whole[weight.data_ptr()] for name, weight in module.items()}  # tied weights share their memory


def _load_shard(file: Path) -> dict[str, Any]:
    """Mapped: moments, which nobody asks for, are never read."""
    return torch.load(file, map_location="cpu", mmap=True)
