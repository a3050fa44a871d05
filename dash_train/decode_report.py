"""What decoding read and how sure it was, for people."""

from dataclasses import asdict, dataclass
from typing import Any

from dash_train.model.cache import TOTALS, Cache, DecodeMode


@dataclass
class DecodeReport:
    """Of a generation or an evaluation: filled in when it ends."""

    decode: DecodeMode = "dash"
    tokens: int = 0
    """New tokens, over all rows."""
    seconds: float = 0.0
    """Spent on them, prompts not included."""
    prompt_seconds: float = 0.0
    density: float | None = None
    """Share that was read: `vattention`, of the tokens of the population, mean over layers, KV heads and steps; `dash`,
    routed over eligible chunks in the Dash layers, at every 64th step. None where nothing was to be left out."""
    half_width: float | None = None
    """vattention: the widest relative interval that any head gave at any step."""
    fallbacks: float | None = None
    """vattention: share of the (layer, KV head, step) that read everything because no small sample was enough."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, cache: Cache) -> None:
        """Take over what a cache counted."""
        total = dict(zip(TOTALS, cache.totals.sum(0).tolist(), strict=True))
        self.decode = cache.decoding.mode
        self.density = total["read"] / total["population"] if total["population"] else None
        if total["decoded"]:
            self.half_width = cache.totals[:, TOTALS.index("half_width")].amax().item()
            self.fallbacks = total["fallbacks"] / total["decoded"]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        parts = [f"{self.decode}: {self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"]
        parts.append("everything read" if self.density is None else f"density {self.density:.3f}")
        if self.half_width is not None and self.fallbacks is not None:
            parts += [f"worst half-width {self.half_width:.3f}", f"{100 * self.fallbacks:.1f} % dense fallbacks"]
        return ", ".join(parts)
