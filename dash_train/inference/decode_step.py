"""One decoding step of a model: eager, or on CUDA a graph that replays all its kernels in one launch."""

import torch
from torch import Tensor

from dash_train.model.cache import Cache
from dash_train.model.transformer import LanguageModel

MEASURED_EVERY = 64


class DecodeStep:
    """Calls the model with one token a row over a cache that holds the prompts.

    The first step and every 64th after it are eager and measure the density of Dash layers; the first also compiles
    what the others need. On CUDA the second step is captured and the others replay it. What a graph does to the cache
    it does in place, on the device: nothing in a step waits for the host.
    """

    def __init__(self, model: LanguageModel, cache: Cache, *, use_graph: bool = True) -> None:
        self.model = model
        self.cache = cache
        self.use_graph = use_graph and cache.lengths.is_cuda
        self.tokens = torch.zeros(len(cache.lengths), 1, dtype=torch.int64, device=cache.lengths.device)
        self.steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, vocab]` after the tokens `[batch]`; the next step may overwrite them."""
        self.tokens.copy_(tokens[:, None])
        measured = self.steps % MEASURED_EVERY == 0
        self.steps += 1
        self.cache.measures_routing = measured
        if measured or not self.use_graph:
            return self._forward()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _forward(self) -> Tensor:
        return self.model(self.tokens, cache=self.cache)["logits"][:, 0]
