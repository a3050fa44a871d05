"""Loss spikes: a step whose loss stands far above those before it."""

import math
from collections import deque
from statistics import median

WINDOW, FEWEST = 64, 16  # losses that are looked back at, and with how many that begins
LEAST_DEVIATION = 1e-3  # nats; a run whose losses hardly differ has no spikes of nothing


class SpikeWatch:
    """Looks at the losses of a run in their order."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss stands more than `threshold` standard deviations above the median of those before it. Spikes
        themselves are not remembered, so that a plateau of them goes on being one; what is not finite is none."""
        if not math.isfinite(loss):
            return False
        if len(self._losses) >= FEWEST:
            middle = median(self._losses)
            # Of a normal distribution, half of all values lie within 0.6745 deviations of the median.
            deviation = median(abs(other - middle) for other in self._losses) / 0.6745
            if loss > middle + self.threshold * max(deviation, LEAST_DEVIATION):
                return True
        self._losses.append(loss)
        return False
