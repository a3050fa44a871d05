"""The arguments of dash_attention and dash_decode that are not tensors."""

from typing import NamedTuple


class DashConfig(NamedTuple):
    """As in dash_attention, which says what each of them does."""

    chunk_size: int
    routing_scale: float
    prior_normalizer: str
    prior_temperature: float
    routing_block: int = 1

    def score_scale(self, head_dim: int) -> float:
        """The factor on q.ktilde in a routing score s; half of it in z = s / 2."""
        return self.routing_scale * head_dim**-0.5
