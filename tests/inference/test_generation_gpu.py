from collections.abc import Callable

import pytest
import torch

from dash_train.inference.decode_step import MEASURED_EVERY, DecodeStep
from dash_train.inference.generation import generate, read_prompts
from dash_train.model.cache import Cache, Decoding
from dash_train.model.transformer import LanguageModel

pytestmark = pytest.mark.gpu

Build = Callable[..., LanguageModel]
DECODINGS = [Decoding("full"), Decoding("dash"), Decoding("vattention", 0.3, 0.2, "denominator")]


def prompts(longest: int) -> list[list[int]]:
    """Ragged."""
    torch.manual_seed(1)
    return [torch.randint(64, (length,)).tolist() for length in (longest, longest // 2 + 3, 5)]


def filled_cache(model: LanguageModel, decoding: Decoding, longest: int, **options: int) -> tuple[Cache, torch.Tensor]:
    """A cache that holds the prompts, and the logits after them."""
    weight = model.lm_head.weight
    cache = Cache.allocate(model.config, 3, longest + 200, weight.dtype, weight.device, decoding=decoding, **options)
    return cache, read_prompts(model, prompts(longest), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["full", "dash", "mixed", "blocks"])
@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda decoding: decoding.mode)
def test_a_graph_gives_what_eager_steps_give(
    decoding: Decoding, attention: str, dtype: torch.dtype, tiny_model: Build
) -> None:
    """To the last bit: logits, what the steps counted, and the cache; across chunks and a measured step."""
    model = tiny_model(attention, head_dim=32).to("cuda", dtype)
    results = []
    for use_graph in (False, True):
        cache, logits = filled_cache(model, decoding, 3000)
        step = DecodeStep(model, cache, use_graph=use_graph)
        seen = []
        for _ in range(MEASURED_EVERY + 6):
            logits = step(logits.argmax(-1)).clone()
            seen.append(logits)
        assert (step._graph is not None) == use_graph
        kept = [tensor for layer in cache.layers for tensor in layer.tensors()]
        results.append([torch.stack(seen), cache.totals, cache.lengths, *kept])
    assert torch.isfinite(results[0][0]).all()
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("attention", ["full", "dash", "blocks"])
@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda decoding: decoding.mode)
def test_a_step_never_waits_for_the_host(decoding: Decoding, attention: str, tiny_model: Build) -> None:
    model = tiny_model(attention, head_dim=32).to("cuda", torch.bfloat16)
    cache, logits = filled_cache(model, decoding, 1000)
    step = DecodeStep(model, cache, use_graph=False)
    tokens = logits.argmax(-1)
    step(tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["full", "dash", "mixed", "blocks"])
@pytest.mark.parametrize("mode", ["full", "dash", "vattention"])
def test_cuda_generates_what_the_cpu_does(mode: str, attention: str, tiny_model: Build) -> None:
    """fp32, over chunk boundaries: the CPU finds each of the GPU's tokens likeliest, but for ties."""
    on_cpu, on_cuda = tiny_model(attention), tiny_model(attention).cuda()
    rows = prompts(100)
    generated = [
        list(row) for row in zip(*generate(on_cuda, rows, max_new_tokens=40, decoding=Decoding(mode)), strict=True)
    ]
    cache = Cache.allocate(on_cpu.config, 3, 200, torch.float32, torch.device("cpu"), decoding=Decoding(mode))
    logits = read_prompts(on_cpu, rows, cache)
    step = DecodeStep(on_cpu, cache)
    for tokens in torch.tensor(generated).T:
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-3
        logits = step(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["full", "dash", "blocks"])
def test_pieces_of_a_prompt_add_up(attention: str, dtype: torch.dtype, tiny_model: Build) -> None:
    model = tiny_model(attention, head_dim=32).to("cuda", dtype)
    (in_pieces, logits), (at_once, expected) = (
        filled_cache(model, Decoding(), 5000, piece_size=piece_size) for piece_size in (1024, 8192)
    )
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert (logits - expected).norm() <= tolerance * expected.norm()
    # The longest row's keys: those of the others continue with pads.
    for one, whole in zip(in_pieces.layers, at_once.layers, strict=True):
        assert (one.keys[0] - whole.keys[0]).norm() <= tolerance * whole.keys[0].norm()
