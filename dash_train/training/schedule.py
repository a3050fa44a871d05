"""The learning rate as a function of the step."""

import math

from dash_train.recipe.schema import ScheduleConfig


def lr_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The share of the peak learning rate that step `step` (from 0) of `steps` uses.

    The warmup rises linearly and reaches 1 at its last step. After it: `cosine` falls along a half cosine to
    `min_lr_ratio`; `wsd` (warmup-stable-decay) stays at 1 and falls over its last `decay_steps`, linearly or as
    1 - sqrt(progress) (arXiv 2405.18392); `constant` stays at 1. Steps after the last keep the last one's.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.type == "constant":
        return 1.0
    if schedule.type == "cosine":
        start = schedule.warmup_steps
    else:
        start = max(schedule.warmup_steps, steps - (schedule.decay_steps or max(1, steps // 5)))
    if step < start:
        return 1.0
    progress = min(1.0, (step + 1 - start) / max(1, steps - start))
    if schedule.type == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.decay == "linear":
        fall = 1 - progress
    else:
        fall = 1 - math.sqrt(progress)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall
