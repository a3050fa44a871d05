"""The output projection and the cross-entropy, which never holds the whole batch's logits.

The backward's two products are formed chunk by chunk while the logits are at hand in the forward, and handed to
autograd in the backward (the weight's gradient is summed in fp32): nothing is computed twice, and ZeRO-3 needs the
weight gathered only while this module's forward runs.

Liger's own fused linear cross-entropy gives either the sum or the losses token by token, and for the latter projects
again in the backward, where ZeRO-3 has let the weight go; it also waits for the device to count the labels. So the loop
is ours, and on CUDA Liger's kernel does the part that pays: softmax, loss and gradient in one pass over 16-bit logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dash_train.model.layers import Linear

IGNORE = -100
CHUNK_LOGITS = 2**27  # logits at a time: 4096 tokens with a vocabulary of 32768
LIGER_BLOCK = 2**15  # logits that one step of Liger's kernel reads, at most


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
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        if with_gradient:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        chunk_tokens = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(hidden), chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            logits = hidden[piece] @ weight.T
            cross_entropy = _cross_entropy_by_liger if logits.is_cuda else _cross_entropy
            grad_logits = cross_entropy(logits, labels[piece], losses[piece], with_gradient)
            if grad_logits is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[piece])
                _add_product(grad_weight, grad_logits.T, hidden[piece])
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor, with_gradient: bool) -> Tensor | None:
    """Write the losses `[tokens]` of logits `[tokens, vocab]`; their gradient is softmax - one_hot, 0 if ignored."""
    scores = logits.float()
    losses.copy_(F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="none"))
    if not with_gradient:
        return None
    gradient = torch.softmax(scores, dim=-1)
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], gradient.new_full((len(labels), 1), -1.0))
    return gradient.mul_((labels != IGNORE)[:, None]).to(logits.dtype)


def _cross_entropy_by_liger(logits: Tensor, labels: Tensor, losses: Tensor, with_gradient: bool) -> Tensor | None:
    """_cross_entropy by Liger's kernel; the gradient overwrites the logits."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    tokens, vocab = logits.shape
    liger_cross_entropy_kernel[(tokens,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=losses.stride(0),
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocab,
        n_non_ignore=tokens,
        sum_non_ignore_weight=tokens,
        weight_sum=0.0,
        ignore_index=IGNORE,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="none",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=with_gradient,
        BLOCK_SIZE=min(LIGER_BLOCK, 1 << (vocab - 1).bit_length()),
        num_warps=32,
    )
    return logits if with_gradient else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in fp32, in one matrix product where the device can."""
    if right.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif right.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
