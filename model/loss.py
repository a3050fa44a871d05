"""The output projection and the cross-entropy, which never holds the whole batch's logits.

The backward's two products are formed chunk by chunk while the logits are at hand in the forward, and handed to
autograd in the backward (the weight's gradient is summed in fp32): nothing is computed twice, and ZeRO-3 needs the
weight gathered only while this module's forward runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_train.model.layers import Linear

IGNORE = -100
CHUNK_TOKENS = 2048


class LanguageModelHead(Linear):
    """Projection to the vocabulary; `forward` gives logits, and with labels the cross-entropy in their place."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[..., vocab]` of hidden states `[..., hidden_size]`; with labels `[...]`, the two losses below.

        The sum of the token losses (fp32, 0-dim, differentiable), and the losses `[...]` themselves (fp32, constants);
        a label of -100 has loss 0.
        """
        if labels is None:
            return super().forward(hidden)
        total, losses = LinearCrossEntropy.apply(
            hidden.flatten(0, -2), self.weight, labels.flatten(), torch.is_grad_enabled()
        )
        return total, losses.view(labels.shape)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed and per-token cross-entropy of hidden `[tokens, hidden_size]` against labels `[tokens]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        if with_gradient:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[piece] @ weight.T).float()
            losses[piece] = F.cross_entropy(logits, labels[piece], ignore_index=IGNORE, reduction="none")
            if with_gradient:
                grad_logits = _cross_entropy_gradient(logits, labels[piece]).to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[piece])
                grad_weight += grad_logits.T @ hidden[piece]
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None


def _cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax - one_hot, zero in the rows that do not count; overwrites the fp32 logits `[tokens, vocab]`."""
    gradient = torch.softmax(logits, dim=-1, out=logits)
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], gradient.new_full((len(labels), 1), -1.0))
    return gradient.mul_((labels != IGNORE)[:, None])
