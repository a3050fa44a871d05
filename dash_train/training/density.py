"""Density control: `attention.target_density` steers the routing scale of each layer by the density of every step."""

import math
from collections.abc import Sequence

from dash_train.model.calibration import set_routing_scales
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

GAIN = 0.03  # of a step: the density of one batch says little, so the scale follows the mean of some 30
LIMIT = 0.05  # the most by which the logarithm of a scale changes in a step


def steer(model: LanguageModel, config: ModelConfig, step: int, densities: Sequence[float | None]) -> None:
    """Change the routing scales by what step `step` (from 0) measured, where `config` has a target for it.

    A larger scale is sparser: its logarithm grows by GAIN log(density / target). Equal on all ranks, since the
    densities are; saved with the model's configuration.

    Args:
        config: of the model, whose `attention.routing_scale` becomes a list.
        densities: one a layer, None for full attention.
    """
    target = config.attention.density_at(step)
    if target is None:
        return
    scales = []
    for layer, density in enumerate(densities):
        scale = config.routing_scale(layer)
        if density:
            change = GAIN * math.log(density / target)
            scale *= math.exp(max(-LIMIT, min(LIMIT, change)))
        scales.append(scale)
    config.attention.routing_scale = scales
    set_routing_scales(model, config)
