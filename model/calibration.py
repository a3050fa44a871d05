"""`routing_scale: auto`: the scale of each Dash layer, from the density that it gives on a first batch."""

import torch
from torch import Tensor

from dash_train.model.attention import Attention
from dash_train.model.config import ModelConfig
from dash_train.model.loss import IGNORE
from dash_train.model.transformer import LanguageModel


@torch.no_grad()
def calibrate_routing_scale(
    model: LanguageModel, tokens: Tensor, document_starts: Tensor | None = None, real: Tensor | None = None
) -> list[float]:
    """Set the routing scales at which this batch's density is `attention.initial_density` in every Dash layer.

    Layer by layer, each looking at the output of those before it with their new scales; where no scale gives that
    density the layer gets the closest (a density floor is set by heads that disagree). Writes the list, one number a
    layer and 1 for full attention, to `model.config.attention.routing_scale` and returns it.

    Args:
        model: also one whose weights DeepSpeed has partitioned; then every rank calls this with the same batch.
        tokens, document_starts, real: as in `LanguageModel.forward`.
    """
    for attention in _attentions(model):
        attention.calibrate_to = model.config.attention.initial_density
    # Through the whole model, whose hooks gather ZeRO-3's weights; labels that do not count spare it the logits.
    model(tokens, labels=torch.full_like(tokens, IGNORE), document_starts=document_starts, real=real)
    for attention in _attentions(model):
        attention.calibrate_to = None
    scales = [attention.routing_scale for attention in _attentions(model)]
    model.config.attention.routing_scale = scales
    return scales


def set_routing_scales(model: LanguageModel, config: ModelConfig) -> None:
    """Give every layer the routing scale that the configuration names for it."""
    for layer, attention in enumerate(_attentions(model)):
        attention.routing_scale = config.routing_scale(layer)


def _attentions(model: LanguageModel) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]
