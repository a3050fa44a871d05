"""`model.attention.router_warmup_steps`: when layers attend to everything and routers learn, and when that ends."""

import logging
from collections.abc import Callable

from dash_train.model.attention import Attention
from dash_train.model.transformer import LanguageModel

logger = logging.getLogger(__name__)


class RouterWarmup:
    """Of one run. `settle` is called where a step may begin or end it."""

    def __init__(self, model: LanguageModel, calibrate: Callable[[], None] | None) -> None:
        """`calibrate` settles the routing scales anew for routers that have learnt; None leaves them alone."""
        self.model, self.calibrate = model, calibrate

    def settle(self, step: int) -> None:
        """What the step after `step` (counted from 0, so the number of steps that are done) shall find."""
        transformer, before = self.model.model, self.model.model.router_warmup
        transformer.router_warmup = step < self.model.config.attention.router_warmup_steps
        if before and not transformer.router_warmup:
            logger.info("step %d: the routers' warm-up is over", step)
            if self.calibrate is not None:
                self.calibrate()

    def error(self) -> dict[str, list[float | None]]:
        """During the warm-up, how far this rank's routing was off in its last micro-batch, per layer."""
        if not self.model.model.router_warmup:
            return {}
        errors = [module.router_error for module in self.model.modules() if isinstance(module, Attention)]
        return {"router_error": [None if error is None else error.item() for error in errors]}
