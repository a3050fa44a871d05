"""The peer of `launch/benchmark.py train`: transformers' Llama as a careful user trains it on one GPU.

Liger kernels (RMSNorm, SwiGLU, RoPE, fused linear cross-entropy), cuDNN attention, gradient checkpointing, fused AdamW.
On a CPU plain torch stands in for Liger.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_train.errors import UserError
from dash_train.huggingface.families import huggingface_config
from dash_train.model.config import ModelConfig
from dash_train.recipe.schema import OptimizerConfig
from dash_train.training.optimizer import parameter_groups

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Peer(nn.Module):
    """The model: `forward` gives the sum of the token losses, as ours does."""

    def __init__(self, config: ModelConfig, *, max_seq: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        if config.qk_norm:
            raise UserError("model.qk_norm: transformers' Llama, the peer, has none; set it to false")
        config = config.model_copy(deep=True)
        config.attention.type = "full"
        values = huggingface_config(config, max_seq)
        del values["architectures"]
        if device.type == "cuda":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            # The fused cross-entropy is called here: Liger's whole forward fits few versions of transformers.
            apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
        with device:
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**values), dtype=dtype, attn_implementation="sdpa"
            )
        self.model.gradient_checkpointing_enable()
        self.model.train()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens and (already shifted) labels `[1, seq]` int64; a label of -100 does not count."""
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        weight: Tensor = self.model.lm_head.weight
        if tokens.is_cuda:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
            return loss(weight, hidden, labels.flatten())
        return F.cross_entropy((hidden @ weight.T).float(), labels.flatten(), reduction="sum")


class PeerOptimizer:
    """Clipping and fused AdamW.

    With `precision` "fp32-master" it does the arithmetic of our engine: masters, moments and gradient accumulation
    are fp32, only the model's copy is bf16. With "bf16" everything has the model's type.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, precision: str) -> None:
        groups = parameter_groups(model, config.weight_decay)
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        if precision == "fp32-master":
            for parameter in model.parameters():
                self.masters[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                parameter.register_post_accumulate_grad_hook(partial(_accumulate, self.masters[parameter]))
            groups = [{**group, "params": [self.masters[p] for p in group["params"]]} for group in groups]
        self.grad_clip = config.grad_clip
        self.updated = [parameter for group in groups for parameter in group["params"]]
        self.adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=self.updated[0].is_cuda
        )

    def step(self) -> None:
        """One update from the gradients since the last."""
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.updated, self.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            if self.masters:
                torch._foreach_copy_(list(self.masters), list(self.masters.values()))


def _accumulate(master: nn.Parameter, parameter: nn.Parameter) -> None:
    """Move a gradient to the master. (A hook that held the optimizer would be a cycle that nothing collects.)"""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None


@contextmanager
def peer_attention(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """SDPA prefers cuDNN; where that takes no grouped heads, transformers repeats the KV heads for it.

    Forward and backward pass belong inside.
    """
    with sdpa_kernel(BACKENDS, set_priority=True):
        if device.type != "cuda" or _cudnn_takes_grouped_heads(config, device):
            yield
            return
        from transformers.integrations import sdpa_attention

        grouped = sdpa_attention.use_gqa_in_sdpa

        def never(*_: Any, **__: Any) -> bool:
            return False

        sdpa_attention.use_gqa_in_sdpa = never
        try:
            yield
        finally:
            sdpa_attention.use_gqa_in_sdpa = grouped


def _cudnn_takes_grouped_heads(config: ModelConfig, device: torch.device) -> bool:
    q = torch.empty(1, config.heads, 256, config.head_dim, dtype=torch.bfloat16, device=device)
    k = torch.empty(1, config.kv_heads, 256, config.head_dim, dtype=torch.bfloat16, device=device)
    return can_use_cudnn_attention(SDPAParams(q, k, k, None, 0.0, True, True))
