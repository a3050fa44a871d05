"""Speed of a whole decoding step of a model with random weights, Dash against full attention over the same cache."""

import argparse
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_train.benchmark.timing import captured, kernel_times, milliseconds
from dash_train.inference.decode_report import DecodeReport
from dash_train.kernels.dash import chunk_summaries, decode_prior
from dash_train.model.attention import Attention
from dash_train.model.cache import Cache, Decoding
from dash_train.model.config import ModelConfig
from dash_train.model.rotary import rotary_tables
from dash_train.model.rows import Rows
from dash_train.model.transformer import Block, LanguageModel

PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MORE_TOKENS = 256  # that the cache has room for, since every timed step adds one
STEPS = 64  # a multiple of any routing block
SCALES = (0.05, 4000.0)  # routing scales that the search tries

Row = dict[str, float | str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py step`; the defaults are a model of 1.2 billion parameters."""
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--context", type=int, default=131072, help="tokens in the cache (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model (default: %(default)s)")
    parser.add_argument(
        "--hidden-size", type=int, default=2048, help="numbers of a token between layers (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers of a head (default: %(default)s)")
    parser.add_argument("--mlp-size", type=int, default=5632, help="numbers inside the MLP (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens of the vocabulary (default: %(default)s)")
    parser.add_argument(
        "--density",
        type=float,
        default=0.05,
        help="share of the eligible chunks that a layer routes to; its scale is searched (default: %(default)s)",
    )
    parser.add_argument(
        "--routing-block", type=int, default=1, help="tokens that share a choice of chunks (default: %(default)s)"
    )
    parser.add_argument(
        "--routing-window", type=int, help="queries whose mean chooses for a routing block (default: the routing block)"
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        default=0.05,
        help="vattention in the full attention's place: relative error (default: %(default)s)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=0.05,
        help="vattention: share of the cases in which the error may exceed epsilon (default: %(default)s)",
    )


@torch.no_grad()
def run(args: argparse.Namespace) -> Row:
    """Milliseconds a step, all of them graphs: Dash, full attention by our kernel and by each peer, and vattention.

    Of Dash the mean over STEPS steps, of which every layer routes in one of `routing_block`.
    """
    model = _model(args)
    cache = _filled_cache(args, model.config)
    tokens = torch.arange(args.batch, device="cuda")[:, None]
    _set_density(model, cache, tokens, args.density, args.context)
    row: Row = {"parameters": float(sum(p.numel() for p in model.parameters()))}

    graph = _graph(model, cache, tokens, args.context)

    def steps() -> None:
        cache.lengths.fill_(args.context)
        for _ in range(STEPS):
            graph.replay()

    row["dash_ms"] = milliseconds(steps) / STEPS
    row |= {f"dash {name}": time / STEPS for name, time in kernel_times(steps, least=0.02 * STEPS).items()}
    row["density"] = _measured(model, cache, tokens, args.context).density or 0.0

    plain_layers = [replace(layer, routing=None) for layer in cache.layers]
    full_cache = replace(
        cache, decoding=Decoding("full"), layers=[replace(layer, summaries=None) for layer in plain_layers]
    )
    row["full_ms"] = milliseconds(_graph(model, full_cache, tokens, args.context).replay)
    row |= _peer_times(model, full_cache, tokens, args.context)
    best = min(time for name, time in row.items() if name.startswith("full") and isinstance(time, float))
    row["speedup_over_full"] = best / float(row["dash_ms"])

    for attention in _attentions(model):
        attention.attention_type = "full"
    sampled = replace(cache, decoding=Decoding("vattention", args.epsilon, args.delta), layers=plain_layers)
    row["vattention_ms"] = milliseconds(_graph(model, sampled, tokens, args.context).replay)
    report = _measured(model, sampled, tokens, args.context)
    row |= {"vattention_density": report.density or 0.0, "vattention_fallbacks": report.fallbacks or 0.0}
    row["vattention_worst_half_width"] = report.half_width or 0.0
    row["vattention_speedup_over_full"] = best / float(row["vattention_ms"])
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _model(args: argparse.Namespace) -> LanguageModel:
    config = ModelConfig(
        layers=args.layers,
        hidden_size=args.hidden_size,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        mlp_size=args.mlp_size,
        vocab_size=args.vocab_size,
        attention={
            "type": "dash",
            "routing_scale": 1.0,
            "routing_block": args.routing_block,
            "routing_window": args.routing_window or args.routing_block,
        },
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LanguageModel(config).bfloat16().eval().requires_grad_(False)


def _filled_cache(args: argparse.Namespace, config: ModelConfig) -> Cache:
    """Random keys, a chunk's sharing a random direction, and values 1 + N(0, 1); their summaries.

    As no prompt is read, nothing but the lengths says that they are there.
    """
    cache = Cache.allocate(
        config, args.batch, args.context + MORE_TOKENS, torch.bfloat16, torch.device("cuda"), decoding=Decoding("dash")
    )
    chunk_size, size = config.attention.chunk_size, (args.kv_heads, args.head_dim)
    chunk_query = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
    for layer in cache.layers:
        assert layer.summaries is not None
        for keys, values, summaries in zip(layer.keys, layer.values, layer.summaries, strict=True):
            directions = torch.randn(len(summaries), *size, device="cuda").repeat_interleave(chunk_size, 0)
            keys.copy_(directions + torch.randn_like(directions))
            values.normal_(mean=1)
            summaries.copy_(chunk_summaries(keys[None], chunk_query, chunk_size=chunk_size)[0])
    return cache


def _set_density(model: LanguageModel, cache: Cache, tokens: Tensor, density: float, context: int) -> None:
    """Give every layer the routing scale at which its router after `tokens` chooses that share of the chunks.

    What a routing window holds comes from steps with the same tokens, which are taken layer by layer.
    """
    cache.measures_routing = False
    routing_block, window = model.config.routing_block(0), model.config.routing_window(0)
    begin = context // STEPS * STEPS  # of a routing block
    places = range(begin - -(-(window - 1) // routing_block) * routing_block, begin + 1)
    tables = [rotary_tables(torch.tensor([[place]], device="cuda"), model.config) for place in places]
    hidden = [model.model.embed_tokens(tokens)] * len(places)
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        attention, state = block.self_attn, cache.layers[layer].routing
        inputs = [(block.input_layernorm(x), rotary) for x, rotary in zip(hidden, tables, strict=True)]
        q = torch.cat([attention.queries_keys_values(*x)[0] for x in inputs], 1)[:, -window:]
        cache.lengths.fill_(begin + 1)
        attention.routing_scale = _scale_of(density, q.mean(1), cache, layer, model.config)
        if state is not None:
            state.recent_q.copy_(q)  # for the first of the steps; their order does not matter to a mean
        for i, place in enumerate(places):
            cache.lengths.fill_(place)
            next(cache.pieces(tokens, None))
            hidden[i], _ = block(hidden[i], tables[i], Rows(cache=cache))


def _scale_of(density: float, q: Tensor, cache: Cache, layer: int, config: ModelConfig) -> float:
    """The routing scale of a layer for the routers' queries q `[batch, heads, head_dim]`."""
    summaries = cache.layers[layer].summaries
    assert summaries is not None
    chunk_size = config.attention.chunk_size
    low, high = SCALES
    for _ in range(16):
        scale = math.sqrt(low * high)
        prior = decode_prior(q, summaries, cache.lengths, chunk_size=chunk_size, routing_scale=scale)
        routed = prior.isfinite().float().sum(2).mean().item() - 1  # without the own chunk
        if routed > density * (cache.lengths[0].item() // chunk_size):
            low = scale
        else:
            high = scale
    return high


def _graph(model: LanguageModel, cache: Cache, tokens: Tensor, context: int) -> torch.cuda.CUDAGraph:
    """One step as a graph; the next replay takes the cache from its context on."""
    cache.measures_routing = False
    cache.lengths.fill_(context)
    graph = captured(lambda: model(tokens, cache=cache)["logits"])
    cache.lengths.fill_(context)
    return graph


def _measured(model: LanguageModel, cache: Cache, tokens: Tensor, context: int) -> DecodeReport:
    """What the steps read."""
    cache.measures_routing = True
    cache.totals.zero_()
    cache.lengths.fill_(context)
    for _ in range(STEPS):
        model(tokens, cache=cache)
    report = DecodeReport()
    report.count(cache)
    return report


def _peer_times(model: LanguageModel, cache: Cache, tokens: Tensor, context: int) -> Row:
    """Times of a step with SDPA over all of the context, in place of our full attention; or the error of what fails.

    SDPA gets what it is fastest on: a cache of its own, `[batch, kv_heads, context, head_dim]`, filled to its end and
    so without a mask. The group's heads share keys by enable_gqa or as rows of queries.
    """

    def own_layout(t: Tensor) -> Tensor:
        return t[:, :context].transpose(1, 2).contiguous()

    caches = [(own_layout(layer.keys), own_layout(layer.values)) for layer in cache.layers]

    def by_gqa(q: Tensor, layer: int) -> Tensor:
        k, v = caches[layer]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def by_rows(q: Tensor, layer: int) -> Tensor:
        k, v = caches[layer]
        grouped_q = q.unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(grouped_q, k, v).flatten(1, 2)

    row: Row = {}
    for name, backend in PEERS.items():
        for way in (by_gqa, by_rows):
            try:
                with sdpa_kernel(backend):
                    graph = _graph(model, replace(cache, attend_all=way), tokens, context)
                row[f"full_{name}_{way.__name__}_ms"] = milliseconds(graph.replay)
            except RuntimeError as error:
                row[f"full_{name}_{way.__name__}_ms"] = str(error).splitlines()[0]
    return row


def _attentions(model: LanguageModel) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]
