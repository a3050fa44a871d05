"""AdamW or Muon, and which parameters get what."""

from typing import Any

import torch
from torch import nn

from dash_train.recipe.schema import OptimizerConfig
from dash_train.training.muon import Muon

NO_DECAY = ("norm", "chunk_query", "embed_tokens", ".bias")
MOMENTUM = 0.95
NO_MUON = ("lm_head",)  # of those that decay


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight matrices, which decay, and norms, biases, chunk queries and embeddings, which do not.

    Chosen by name, since ZeRO-3 flattens the shapes.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (keep if any(word in name for word in NO_DECAY) else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The same, but that the blocks' matrices are a group of their own, with `muon: True`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, keep = parameter_groups(model, weight_decay)
    matrices = [p for p in decay["params"] if not any(word in names[p] for word in NO_MUON)]
    others = [p for p in decay["params"] if any(word in names[p] for word in NO_MUON)]
    groups = [{**decay, "params": matrices, "muon": True}, {**decay, "params": others, "muon": False}]
    return [group for group in (*groups, {**keep, "muon": False}) if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, zero_stage: int) -> torch.optim.AdamW:
    """The optimizer for DeepSpeed to wrap; on stage 0, where DeepSpeed wraps nothing, one that guards itself."""
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    optimizer: torch.optim.AdamW
    if config.type == "muon":
        groups = muon_groups(model, config.weight_decay)
        momentum = MOMENTUM if config.momentum is None else config.momentum
        optimizer = (Muon if zero_stage else GuardedMuon)(groups, momentum=momentum, **options)
    else:
        groups = parameter_groups(model, config.weight_decay)
        optimizer = (torch.optim.AdamW if zero_stage else GuardedAdamW)(groups, **options)
    if isinstance(optimizer, Guarded):
        optimizer.grad_clip = config.grad_clip
    return optimizer


class Guarded(torch.optim.Optimizer):
    """An optimizer that clips by the global norm and skips a step whose gradient is not finite.

    DeepSpeed's ZeRO optimizers do both; its stage 0 reports no norm and takes every step. The two attributes are the
    names under which the engine looks for them.
    """

    grad_clip = 0.0
    overflow = False
    _global_grad_norm: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        if self.grad_clip:
            torch._foreach_mul_(gradients, torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0))
        return super().step(closure)


class GuardedAdamW(Guarded, torch.optim.AdamW): ...


class GuardedMuon(Guarded, Muon): ...
