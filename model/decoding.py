"""Attention of one new token a row over a cache, in each of the ways there are to decode."""

from functools import partial
from typing import Any

from torch import Tensor

from dash_train.kernels.dash import dash_decode, decode_prior
from dash_train.kernels.full import full_decode
from dash_train.kernels.vattention import vattention_decode
from dash_train.model.cache import Cache


def attend_step(q: Tensor, cache: Cache, layer: int, routing: dict[str, Any] | None) -> Tensor:
    """Attention of q `[batch, heads, head_dim]` over a layer's cache, in which its own key and value already stand.

    `routing` is how the layer routes, keywords of dash_decode; None in a full-attention layer. What the token changes
    in the cache has been done, by append_token.
    """
    mode = cache.decoding.mode
    if mode == "vattention":
        return _sampled(q, cache, layer, routing)
    if mode == "full" or routing is None:
        return attend_everything(q, cache, layer)
    return _routed(q, cache, layer, routing)


def attend_everything(q: Tensor, cache: Cache, layer: int) -> Tensor:
    """Full attention of q `[batch, heads, head_dim]` over a layer's cache."""
    if cache.attend_all is not None:
        return cache.attend_all(q, layer)
    memory = cache.layers[layer]
    return full_decode(q, memory.keys, memory.values, cache.lengths, lists=cache.list_all_chunks())


def _routed(q: Tensor, cache: Cache, layer: int, routing: dict[str, Any]) -> Tensor:
    memory = cache.layers[layer]
    assert memory.summaries is not None
    caches = (memory.keys, memory.values, memory.summaries)
    call = partial(dash_decode, q, *caches, cache.lengths, state=memory.routing, **routing)
    if not cache.measures_routing:
        return call()
    out, active = call(return_active=True)
    eligible = (cache.lengths - 1) // routing["chunk_size"] * active.shape[1]
    cache.count_routing(layer, (active.sum(1) * cache.counted).sum(), (eligible * cache.counted).sum())
    return out


def _sampled(q: Tensor, cache: Cache, layer: int, routing: dict[str, Any] | None) -> Tensor:
    memory, decoding = cache.layers[layer], cache.decoding
    assert memory.summaries is not None and cache.seeds is not None
    prior = None
    if routing is not None:
        prior = decode_prior(q, memory.summaries, cache.lengths, state=memory.routing, **routing)
    out, report = vattention_decode(
        q,
        memory.keys,
        memory.values,
        cache.lengths,
        epsilon=decoding.epsilon,
        delta=decoding.delta,
        verify=decoding.verify,
        summaries=memory.summaries,
        chunk_bias=prior,
        seed=cache.seeds[layer],
        bounds=memory.bounds,
        **{name: value for name, value in vars(decoding.sampling).items() if name != "bounds"},
        chunk_size=memory.keys.shape[1] // memory.summaries.shape[1],
    )
    cache.count_samples(layer, report.tokens_read, report.density, report.half_width, report.dense_fallback)
    return out
