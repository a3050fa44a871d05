"""What decoding read and how sure it was, for people."""

from dataclasses import dataclass, field

from dash_train.model.cache import TOTALS, Cache, DecodeMode


@dataclass
class DecodeReport:
    """What a generation or an evaluation read, how fast, and how sure it was."""

    decode: DecodeMode = "dash"
    tokens: int = 0
    """New tokens, over all rows."""
    seconds: float = 0.0
    """Spent on them, prompts not included."""
    prompt_seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0.0))
    """What the caches counted, over all layers."""

    def count(self, cache: Cache) -> None:
        """Add what a cache counted."""
        self.decode = cache.decoding.mode
        worst = max(self.totals["half_width"], cache.totals[:, TOTALS.index("half_width")].amax().item())
        for name, total in zip(TOTALS, cache.totals.sum(0).tolist(), strict=True):
            self.totals[name] += total
        self.totals["half_width"] = worst

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def density(self) -> float | None:
        """The share that was read: with `vattention` of the tokens of the population, with `dash` chunks routed to over
        eligible chunks, in the Dash layers and the steps that were measured. None where nothing could be left out."""
        return self.totals["read"] / self.totals["population"] if self.totals["population"] else None

    @property
    def half_width(self) -> float | None:
        """vattention: the widest relative interval of any head at any step."""
        return self.totals["half_width"] if self.totals["decoded"] else None

    @property
    def fallbacks(self) -> float | None:
        """vattention: the share of (layer, KV head, step) that read everything since no small sample was enough."""
        return self.totals["fallbacks"] / self.totals["decoded"] if self.totals["decoded"] else None

    def __str__(self) -> str:
        parts = [f"{self.decode}: {self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"]
        parts.append("everything read" if self.density is None else f"density {self.density:.3f}")
        if self.half_width is not None and self.fallbacks is not None:
            parts += [f"worst half-width {self.half_width:.3f}", f"{100 * self.fallbacks:.1f} % dense fallbacks"]
        return ", ".join(parts)
