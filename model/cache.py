"""The KV cache of a batch of rows, each with its own length, and what decoding over it did."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from dash_train.kernels.dash import RoutingState
from dash_train.kernels.dash.chunk_lists import ChunkLists
from dash_train.kernels.full import list_all_chunks
from dash_train.model.config import ModelConfig

DecodeMode = Literal["full", "dash", "vattention"]
PIECE_SIZE = 8192
TOTALS = ("read", "population", "fallbacks", "decoded", "half_width")


@dataclass(frozen=True)
class Sampling:
    """How vattention chooses what it reads: keywords of vattention_decode, but `bounds`."""

    sink: int = 128
    """Tokens at the start that are read for certain, in whole chunks."""
    window: int = 128
    """Tokens at the end that are read for certain, in whole chunks."""
    heavy: float = 0.05
    """Share of the chunks that is read for certain because their summaries weigh most."""
    base_sample: int = 512
    """Tokens of the first sample, from which the variances come; at least 2."""
    max_sample: float = 0.5
    """A sample above this share of what it is taken from is not taken: everything is read."""
    value_floor: float = 0.0
    """The least norm of an output that the error is relative to, in units of the values' root mean square."""
    bounds: bool = False
    """Keep the least and the largest key of every chunk, channel by channel, so that a chunk in which a single heavy
    token can hide is read for certain; two more summaries in the cache."""


@dataclass(frozen=True)
class Decoding:
    """How a layer attends over a cache."""

    mode: DecodeMode = "dash"
    """`dash`: every layer's own attention. `full`: softmax attention to all tokens in every layer, prompts included: on
    a Dash model a baseline for studies, since its router is ignored. `vattention`: prompts as in `dash`, then sampled
    steps: full-attention layers from all tokens, Dash layers from the routed chunks with their priors."""
    epsilon: float = 0.05
    """vattention: the relative error that is allowed, from 0 to 1."""
    delta: float = 0.05
    """vattention: how often it may be exceeded, per head, layer and step."""
    verify: Literal["output", "denominator"] = "output"
    """vattention: what the error is measured on."""
    routing_every: int | None = None
    """Dash layers whose routing block is longer choose their chunks at every so many tokens, a power of two, from the
    window that ends there. None: at their routing block's. Prompts are read as the model was trained."""

    sampling: Sampling = Sampling()
    """vattention: what is read for certain, and how much is sampled."""

    def routing_block(self, block: int) -> int:
        """Tokens that share a routing in steps, for a layer of that routing block."""
        return block if self.routing_every is None else min(self.routing_every, block)


@dataclass(frozen=True)
class LayerCache:
    """What one layer remembers. Rows fill it from the left; what stands at and after a row's length means nothing."""

    keys: Tensor  # [batch, capacity, kv_heads, head_dim], rotated
    values: Tensor  # [batch, capacity, kv_heads, head_dim]
    summaries: Tensor | None  # [batch, capacity / chunk_size, kv_heads, head_dim] fp32; where decoding looks at them
    routing: RoutingState | None  # where routing looks back: at more than the newest token's own query
    bounds: tuple[Tensor, Tensor] | None = None  # least and largest keys, each like summaries, in the keys' type

    def tensors(self) -> Iterator[Tensor]:
        """All of them, `[batch, ...]`."""
        yield from (self.keys, self.values)
        if self.summaries is not None:
            yield self.summaries
        if self.routing is not None:
            yield from self.routing.tensors()
        yield from self.bounds or ()

    def update_bounds(self, start: int, stop: int) -> None:
        """Of the chunks from position `start` on, once the prompts' keys up to `stop` are there."""
        if self.bounds is not None:
            chunks = slice(start // self._chunk_size, -(-stop // self._chunk_size))
            keys = self.keys.unflatten(1, (-1, self._chunk_size))[:, chunks]
            self.bounds[0][:, chunks], self.bounds[1][:, chunks] = keys.aminmax(dim=2)

    def update_last_bounds(self, lengths: Tensor) -> None:
        """Of the chunk of each row's newest token; they mean something once it is complete."""
        if self.bounds is not None:
            row, chunk = torch.arange(len(lengths), device=lengths.device), (lengths - 1) // self._chunk_size
            keys = self.keys.unflatten(1, (-1, self._chunk_size))[row, chunk]
            self.bounds[0][row, chunk], self.bounds[1][row, chunk] = keys.aminmax(dim=1)

    @property
    def _chunk_size(self) -> int:
        assert self.bounds is not None
        return self.keys.shape[1] // self.bounds[0].shape[1]


@dataclass
class Cache:
    """The caches of all layers, which `LanguageModel.forward` fills: with the prompts, then token by token.

    All that changes from step to step is a tensor changed in place, so that a step can be a CUDA graph.
    """

    layers: list[LayerCache]
    lengths: Tensor  # [batch] int32; in a step its token is included, and all tokens while prompts are read
    requests: Tensor  # [batch] int64, the seeds of the rows
    counted: Tensor  # [batch] fp64: 0 for a row that shall not count in `totals`, such as one that has ended
    totals: Tensor  # [layers, TOTALS] fp64, of all forwards since it was last zeroed
    decoding: Decoding
    piece_size: int  # prompt tokens that go through the model together
    start: int | None = None  # during a forward: the position of its first token; None in a step
    seeds: Tensor | None = None  # [layers, batch] int64, of the step in progress (vattention)
    all_chunks: ChunkLists | None = None  # of the step in progress, once a layer attends to everything
    measures_routing: bool = True  # whether dash steps count in `totals`, by a few small kernels a layer
    attend_all: Callable[[Tensor, int], Tensor] | None = None  # (q, layer) -> out, in place of our full attention

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        decoding: Decoding | None = None,
        piece_size: int = PIECE_SIZE,
        requests: list[int] | None = None,
    ) -> Self:
        """An empty cache for `capacity` tokens a row, rounded up to whole chunks.

        Args:
            decoding: how to attend (default: each layer in its own way).
            piece_size: prompts are read in pieces of so many tokens, rounded up to whole chunks.
            requests: a seed below 2^63 for each row (default: 0, 1, ...); its samples depend on no other row.
        """
        decoding = decoding or Decoding()
        chunk_size = config.attention.chunk_size
        chunks = -(-capacity // chunk_size)

        def zeros(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, rows, config.kv_heads, config.head_dim, dtype=dtype, device=device)

        bounded = decoding.mode == "vattention" and decoding.sampling.bounds

        def layer_cache(layer: int) -> LayerCache:
            routes = decoding.mode != "full" and config.attention_type(layer) == "dash"
            window = config.routing_window(layer)
            looks_back = routes and (window > 1 or config.routing_block(layer) > 1)
            sizes = (config.heads, config.kv_heads, config.head_dim, window)
            return LayerCache(
                keys=zeros(chunks * chunk_size, dtype),
                values=zeros(chunks * chunk_size, dtype),
                summaries=zeros(chunks, torch.float32) if routes or decoding.mode == "vattention" else None,
                routing=RoutingState.allocate(batch, chunks, *sizes, dtype, device) if looks_back else None,
                bounds=(zeros(chunks, dtype), zeros(chunks, dtype)) if bounded else None,
            )

        return cls(
            layers=[layer_cache(layer) for layer in range(config.layers)],
            lengths=torch.zeros(batch, dtype=torch.int32, device=device),
            requests=torch.tensor(requests or list(range(batch)), device=device),
            counted=torch.ones(batch, dtype=torch.float64, device=device),
            totals=torch.zeros(config.layers, len(TOTALS), dtype=torch.float64, device=device),
            decoding=decoding,
            piece_size=-(-piece_size // chunk_size) * chunk_size,
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.layers[0].keys.shape[1]

    def pieces(self, tokens: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Tokens, positions and `real` of the forwards that tokens `[batch, seq]` take, each announced to the layers.

        One token a row is a step, which every row takes at its own length; more are the prompts, into an empty cache.
        """
        if tokens.shape[1] == 1:
            self._begin_step()
            yield tokens, self.lengths[:, None] - 1, None
            return
        if real is None:
            self.lengths.fill_(tokens.shape[1])
        else:
            self.lengths.copy_(real.sum(1))
        for start in range(0, tokens.shape[1], self.piece_size):
            self.start = start
            piece = tokens[:, start : start + self.piece_size]
            positions = torch.arange(start, start + piece.shape[1], device=tokens.device)[None]
            yield piece, positions, None if real is None else real[:, start : start + self.piece_size]

    def _begin_step(self) -> None:
        """Room for one more token a row."""
        self.start = None
        self.all_chunks = None
        self.lengths.add_(1)
        if self.decoding.mode == "vattention":
            layers = torch.arange(len(self.layers), device=self.lengths.device)
            self.seeds = _mix(_mix(self.requests + _mix(layers)[:, None]) + self.lengths)

    def list_all_chunks(self) -> ChunkLists:
        """What layers that attend to everything read in this step, the same in all of them."""
        if self.all_chunks is None:
            self.all_chunks = list_all_chunks(self.lengths, *self.layers[0].keys.shape[1:3])
        return self.all_chunks

    def last(self, hidden: Tensor) -> Tensor:
        """The hidden state of each row's last real token, of `[batch, seq, hidden_size]` just computed."""
        if hidden.shape[1] == 1:
            return hidden
        return hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1][:, None]

    def count_routing(self, layer: int, active: Tensor, eligible: Tensor) -> None:
        """Add chunks routed to and chunks eligible (0-dim) to a layer's totals."""
        self.totals[layer, :2] += torch.stack((active, eligible))

    def count_samples(self, layer: int, read: Tensor, density: Tensor, half_width: Tensor, fallback: Tensor) -> None:
        """Add one vattention step, the fields of its report (`[batch, kv_heads or heads]`), to a layer's totals."""
        read = read.double()
        per_row = (read, read / density, fallback.double(), torch.ones_like(read))
        self.totals[layer, :4] += torch.stack([(counts.sum(1) * self.counted).sum() for counts in per_row])
        worst = half_width.amax(1).masked_fill(self.counted == 0, 0).amax()
        self.totals[layer, 4] = torch.maximum(self.totals[layer, 4], worst)


def _mix(x: Tensor) -> Tensor:
    """Scatter int64 values over [0, 2^63): the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF
