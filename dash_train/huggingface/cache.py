"""Our cache with what transformers' `generate` asks of one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.generation import choose_decoding
from dash_train.model.cache import PIECE_SIZE, Cache, LayerCache
from dash_train.model.config import ModelConfig


class GenerationCache(Cache):
    """It grows with its rows."""

    is_compileable = False
    is_linear = (False,)
    filled = 0  # tokens a row, with padding: `lengths` without waiting for the device

    @classmethod
    def begin(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        options: Any = None,
    ) -> Self:
        """An empty cache that decodes as `options`, a generation config, says."""
        names = ("epsilon", "delta", "verify", "routing_every")
        given = {name: getattr(options, name) for name in names if hasattr(options, name)}
        return cls.allocate(
            config,
            batch,
            capacity,
            dtype,
            device,
            decoding=choose_decoding(config, getattr(options, "decode", None), **given),
            piece_size=getattr(options, "piece_size", PIECE_SIZE),
        )

    def get_seq_length(self) -> int:
        """Tokens a row that have gone in, with padding."""
        return self.filled

    @property
    def longest(self) -> Tensor:
        """Tokens of the longest row, 0-dim."""
        return self.lengths.max()

    def pieces(self, tokens: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """As our cache has them; several tokens that continue rows go one by one."""
        continued = self.filled > 0
        self._make_room(tokens.shape[1])
        for some in tokens.split(1, dim=1) if continued else (tokens,):
            yield from super().pieces(some, None if continued else real)
        if not continued:
            self.totals.zero_()  # the report is on the steps

    def report(self) -> DecodeReport:
        """What the steps since the prompts read, and the worst half-width."""
        report = DecodeReport()
        report.count(self)
        return report

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes a copy of `rows[i]` (int `[batch]`): beam search goes on with the best beams."""
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor.copy_(tensor[rows])
        for per_row in (self.lengths, self.requests):
            per_row.copy_(per_row[rows])

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back, as assisted decoding does: not where routing looks back over its block."""
        return all(layer.routing is None for layer in self.layers)

    def activate_past_recording(self) -> None:
        """Nothing has to be kept for `crop` that is not."""

    def crop(self, tokens: int) -> None:
        """Take back the last so many tokens of every row; `tokens` is negative."""
        self.lengths += tokens
        self.filled += tokens

    def _make_room(self, tokens: int) -> None:
        """Room for so many more tokens a row; their number is added to `filled`."""
        self.filled += tokens
        if self.filled > self.capacity:
            self.layers = [_grown(layer, max(self.filled, 2 * self.capacity)) for layer in self.layers]


def _grown(layer: LayerCache, tokens: int) -> LayerCache:
    """A copy with room for at least so many tokens a row."""
    capacity = layer.keys.shape[1]
    multiple = -(-tokens // capacity)  # of whole chunks, since the capacity is

    def grow(tensor: Tensor, dim: int) -> Tensor:
        return torch.cat([tensor, *[torch.zeros_like(tensor)] * (multiple - 1)], dim)

    routing = layer.routing
    if routing is not None:
        lists = routing.lists
        lists = lists._replace(chunks=grow(lists.chunks, 2), log_pbar=grow(lists.log_pbar, 2))
        routing = routing._replace(lists=lists)
    summaries = None if layer.summaries is None else grow(layer.summaries, 1)
    return LayerCache(grow(layer.keys, 1), grow(layer.values, 1), summaries, routing)
