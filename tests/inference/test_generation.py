from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dash_train.errors import UserError
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.decode_step import DecodeStep
from dash_train.inference.generation import (
    TextStream,
    choose_decoding,
    generate,
    generate_text,
    read_prompts,
    read_prompts_file,
)
from dash_train.kernels.full import list_all_chunks
from dash_train.model.cache import Cache, Decoding, Sampling
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]

PROMPTS = [[1, 2, 3], list(range(30)), [5] * 47, [9]]
ROUTING = {
    "R1-w4": {"routing_block": 1, "routing_window": 4},
    "R8-w1": {"routing_block": 8, "routing_window": 1},
    "R16-w16": {"routing_block": 16, "routing_window": 16},
    "R4-w40": {"routing_block": 4, "routing_window": 40},
    "R64-w16": {"routing_block": 64, "routing_window": 16, "chunk_size": 64},
}


def assert_greedy(model: LanguageModel, prompts: list[list[int]], generated: list[list[int]]) -> None:
    """Every row's tokens are those that the model's own full forward finds likeliest, but for ties."""
    for prompt, tokens in zip(prompts, generated, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]))["logits"][0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-4


def rows(steps: Iterable[list[int | None]]) -> list[list[int | None]]:
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("piece_size", [16, 8192])
@pytest.mark.parametrize("attention", ["full", "dash", "mixed", "blocks"])
def test_decoding_gives_the_full_forwards_tokens(attention: str, piece_size: int, tiny_model: Build) -> None:
    """Ragged prompts, in one piece and in several, over several chunk boundaries (the chunk is 16)."""
    model = tiny_model(attention)
    generated = rows(generate(model, PROMPTS, max_new_tokens=36, piece_size=piece_size))
    assert [len(row) for row in generated] == [36] * 4
    assert_greedy(model, PROMPTS, generated)


def forced(model: LanguageModel, prompts: list[list[int]], steps: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [rows, steps + 1, vocab] after the prompts and after each of the tokens `steps` [rows, steps]."""
    capacity = max(map(len, prompts)) + steps.shape[1]
    cache = Cache.allocate(model.config, len(prompts), capacity, torch.float32, torch.device("cpu"), **options)
    step = DecodeStep(model, cache)
    return torch.stack([read_prompts(model, prompts, cache), *(step(tokens).clone() for tokens in steps.T)], 1)


def uncached(model: LanguageModel, prompts: list[list[int]], steps: torch.Tensor) -> torch.Tensor:
    """The same by full forwards."""
    rows = zip(prompts, steps.tolist(), strict=True)
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([prompt + row]))["logits"][0, len(prompt) - 1 :] for prompt, row in rows]
        )


@pytest.mark.parametrize("piece_size", [16, 8192])
@pytest.mark.parametrize("routing", ROUTING.values(), ids=ROUTING)
def test_steps_of_routing_blocks_give_the_full_forwards_logits(
    routing: dict, piece_size: int, tiny_model: Build
) -> None:
    """Ragged prompts that end in different pieces, chunks and blocks; steps over the borders of all of them."""
    model = tiny_model("dash", routing=routing)
    prompts = torch.randint(64, (5, 150)).tolist()
    prompts = [prompt[:length] for prompt, length in zip(prompts, (1, 37, 64, 129, 150), strict=True)]
    steps = torch.randint(64, (5, 30))
    logits = forced(model, prompts, steps, piece_size=piece_size)
    torch.testing.assert_close(logits, uncached(model, prompts, steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every", [1, 4])
def test_routing_every_few_tokens_is_a_smaller_block(every: int, tiny_model: Build) -> None:
    """After prompts that have nothing to route to: those are read with the model's own blocks."""
    model = tiny_model("dash", routing={"routing_block": [16, 2], "routing_window": 4})
    smaller = tiny_model("dash", routing={"routing_block": [every, min(every, 2)], "routing_window": 4})
    prompts, steps = [[1, 2, 3], list(range(16)), [7] * 9], torch.randint(64, (3, 40))
    logits = forced(model, prompts, steps, decoding=Decoding("dash", routing_every=every))
    torch.testing.assert_close(logits, uncached(smaller, prompts, steps), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits, uncached(model, prompts, steps), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", "dash", "vattention"])
def test_pieces_of_a_prompt_add_up(mode: str, tiny_model: Build) -> None:
    """The cache and the last logits after prompts in pieces of 16, 32 and all at once."""
    model = tiny_model("mixed", routing=ROUTING["R4-w40"])
    caches, logits = [], []
    for piece_size in (1, 32, 8192):
        cache = Cache.allocate(
            model.config, 4, 60, torch.float32, torch.device("cpu"), decoding=Decoding(mode), piece_size=piece_size
        )
        logits.append(read_prompts(model, PROMPTS, cache))
        caches.append(cache)
    for cache, last in zip(caches[:2], logits[:2], strict=True):
        torch.testing.assert_close(last, logits[2])
        for one, whole in zip(cache.layers, caches[2].layers, strict=True):
            for in_pieces, at_once in zip(one.tensors(), whole.tensors(), strict=True):
                torch.testing.assert_close(in_pieces, at_once)


def test_full_ignores_the_router(tiny_model: Build) -> None:
    """A Dash model decoded in full is the full-attention model with its weights."""
    model, plain = tiny_model("dash"), tiny_model("full")
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.endswith("chunk_query")})
    generated = rows(generate(model, PROMPTS, max_new_tokens=20, decoding=Decoding("full")))
    assert_greedy(plain, PROMPTS, generated)


@pytest.mark.parametrize("attention", ["full", "dash", "mixed", "blocks"])
def test_vattention_that_reads_everything_is_exact(attention: str, tiny_model: Build) -> None:
    """Contexts that fit into sink and window leave nothing to a sample."""
    model, report = tiny_model(attention), DecodeReport()
    decoding = Decoding("vattention", epsilon=0.01)
    generated = rows(generate(model, PROMPTS, max_new_tokens=36, decoding=decoding, report=report))
    assert_greedy(model, PROMPTS, generated)
    assert (report.density, report.half_width, report.fallbacks) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_vattention_samples(attention: str, tiny_model: Build) -> None:
    """A long prompt: less than everything is read, within the bound; a row's sample is its own."""
    model, report = tiny_model(attention), DecodeReport()
    for layer in model.model.layers:
        layer.self_attn.routing_scale = 1e-3  # routes to nearly all chunks
    torch.manual_seed(1)
    long, longer = torch.randint(64, (2, 3000)).tolist()
    options: dict = {"max_new_tokens": 4, "decoding": Decoding("vattention", 0.3, 0.2, "denominator")}
    both = rows(generate(model, [long, longer[:2500]], report=report, **options))
    assert report.decode == "vattention"
    assert 0.1 < report.density < 0.9
    assert 0 < report.half_width < 0.35
    assert report.fallbacks < 0.5
    assert report.tokens == 8
    assert rows(generate(model, [long], **options)) == both[:1]


@pytest.mark.parametrize("sampling", [Sampling(heavy=1.0), Sampling(max_sample=0.0), Sampling(base_sample=3000)])
def test_sampling_options_reach_the_sampler(sampling: Sampling, tiny_model: Build) -> None:
    """Each makes it read everything, where the defaults do not."""
    torch.manual_seed(1)
    prompt, report = torch.randint(64, (2000,)).tolist(), DecodeReport()
    decoding = Decoding("vattention", 0.3, 0.2, "denominator", sampling=sampling)
    list(generate(tiny_model("full"), [prompt], max_new_tokens=2, decoding=decoding, report=report))
    assert report.density == 1.0


def test_the_cache_keeps_bounds_of_its_chunks(tiny_model: Build) -> None:
    model = tiny_model("dash")
    decoding = Decoding("vattention", sampling=Sampling(bounds=True))
    cache = Cache.allocate(model.config, 2, 60, torch.float32, torch.device("cpu"), decoding=decoding, piece_size=16)
    read_prompts(model, [list(range(30)), [1, 2, 3]], cache)
    for token in range(20):
        model(torch.tensor([[token], [token]]), cache=cache)
    chunk_size = model.config.attention.chunk_size
    for layer in cache.layers:
        chunks = layer.keys.unflatten(1, (-1, chunk_size))
        for row, length in enumerate((50, 23)):
            complete = length // chunk_size
            for bound, expected in zip(layer.bounds, (chunks.amin(2), chunks.amax(2)), strict=True):
                assert torch.equal(bound[row, :complete], expected[row, :complete])


def test_seeds_fold_request_layer_and_step(tiny_model: Build) -> None:
    model = tiny_model("full")
    seen = []
    for requests in ([5, 6], [6, 5]):
        cache = Cache.allocate(
            model.config, 2, 20, torch.float32, torch.device("cpu"), decoding=Decoding("vattention"), requests=requests
        )
        read_prompts(model, [[1, 2], [3]], cache)
        for _ in range(3):
            model(torch.tensor([[1], [2]]), cache=cache)
            seen.append(cache.seeds)
    # Requests 5 and 6 at lengths 3, 4, 5 and 2, 3, 4, then the other way round: at 2, 3, 4 and 5 each, in two layers.
    assert len(torch.stack(seen).unique()) == 2 * 4 * 2
    assert all((seeds >= 0).all() for seeds in seen)


def test_the_lists_of_everything_are_made_once_a_step(tiny_model: Build) -> None:
    model = tiny_model("full")
    cache = Cache.allocate(model.config, 2, 150, torch.float32, torch.device("cpu"))
    read_prompts(model, [[1, 2], [3]], cache)
    for _ in range(3):
        with patch("dash_train.model.cache.list_all_chunks", wraps=list_all_chunks) as made:
            model(torch.tensor([[1], [2]]), cache=cache)
        made.assert_called_once()
        assert torch.equal(cache.list_all_chunks().keys, cache.lengths[:, None].expand(2, 2))


def test_the_report_counts_what_is_routed(tiny_model: Build) -> None:
    report = DecodeReport()
    list(generate(tiny_model("dash"), [list(range(60)), [1] * 40], max_new_tokens=2, report=report))
    assert 0 < report.density <= 1
    assert report.half_width is None
    assert report.tokens == 4
    assert "density 0." in str(report) or "density 1.000" in str(report)
    list(generate(tiny_model("full"), [[1]], max_new_tokens=2, report=(full := DecodeReport())))
    assert "everything read" in str(full)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_depend_on_the_batch(temperature: float, tiny_model: Build) -> None:
    model = tiny_model()
    first, second = [1, 2, 3], [4] * 20
    batch = list(generate(model, [first, second], max_new_tokens=12, temperature=temperature, top_p=0.9))
    alone = list(generate(model, [first], max_new_tokens=12, temperature=temperature, top_p=0.9))
    assert [step[0] for step in batch] == [step[0] for step in alone]


def test_seed_decides_the_samples(tiny_model: Build) -> None:
    model = tiny_model()
    runs = [list(generate(model, [[1]], max_new_tokens=12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_tiny_top_p_is_greedy(tiny_model: Build) -> None:
    model = tiny_model()
    greedy = list(generate(model, PROMPTS, max_new_tokens=5))
    assert list(generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, top_p=1e-6)) == greedy


def test_rows_end_at_eos(tiny_model: Build) -> None:
    model = tiny_model()
    greedy = [step[0] for step in generate(model, [[1, 2, 3]], max_new_tokens=20)]
    eos_id = greedy[4]
    end = greedy.index(eos_id)
    ended = [step[0] for step in generate(model, [[1, 2, 3], [8, 9]], max_new_tokens=20, eos_id=eos_id)]
    assert ended == greedy[: end + 1] + [None] * (len(ended) - end - 1)


def test_any_of_several_eos_ids_ends_a_row(tiny_model: Build) -> None:
    model = tiny_model()
    greedy = [step[0] for step in generate(model, [[1, 2, 3]], max_new_tokens=20)]
    end = min(greedy.index(greedy[4]), greedy.index(greedy[7]))
    ended = [step[0] for step in generate(model, [[1, 2, 3]], max_new_tokens=20, eos_id=[greedy[7], greedy[4]])]
    assert ended == greedy[: end + 1]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature: float, tiny_model: Build) -> None:
    """A hot sample over 64 rows, of which the tokenizer knows 8."""
    options: dict = {"max_new_tokens": 40, "temperature": temperature, "vocab_size": 8}
    drawn = rows(generate(tiny_model(), [[1, 2, 3], [4]], **options))
    assert max(map(max, drawn)) < 8


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict, tiny_model: Build) -> None:
    with pytest.raises(UserError, match=f"found .*{next(iter(wrong))}"):
        list(generate(tiny_model(), [[1]], **{"max_new_tokens": 1, **wrong}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "dash"}, "needs a model with Dash layers"),
        ({"mode": "sparse"}, "expected decode full, dash or vattention .* found sparse"),
        ({"verify": "both"}, "found full, both"),
        ({"epsilon": 1.0}, "found epsilon 1.0"),
        ({"delta": 0.0}, "delta 0.0"),
        ({"routing_every": 3}, "power of two.* found 3"),
        ({"heavy": 1.5}, "heavy from 0 to 1.* found 1.5"),
        ({"base_sample": 1}, "base_sample of at least 2; found 1"),
    ],
)
def test_unknown_ways_to_decode_are_refused(wrong: dict, message: str, tiny_model: Build) -> None:
    with pytest.raises(UserError, match=message):
        choose_decoding(tiny_model("full").config, **wrong)


def test_an_empty_prompt_is_refused(tiny_model: Build) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        list(generate(tiny_model(), [[1], []], max_new_tokens=1))


def test_a_prompts_line_ends_with_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\fb\n\u2028c\x85 \r\n\nlast\rone".encode())
    assert read_prompts_file(path) == ["a\fb", "\u2028c\x85 ", "", "last\rone"]


def test_prompts_are_read_from_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines"}\n"plain"\n')
    assert read_prompts_file(path) == ["two\nlines", "plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"fine\ncaf\xe9\n", r"p.txt:2: not UTF-8 \(byte 4 of the line\)"),
        ("p.txt", b"", "holds no prompt"),
        ("p.jsonl", b'"a"\n{"text": "b"}\n', "p.jsonl:2: expected a string or"),
        ("p.jsonl", b"a\n", "p.jsonl:1: not JSON"),
    ],
)
def test_files_without_prompts_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts_file(tmp_path / name)


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes, and which drops a space in front."""

    bos_id, eos_id, vocab_size = 1, 2, 64

    def encode(self, text: str) -> list[int]:
        return [3] * len(text)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def test_streamed_text_is_whole_characters() -> None:
    stream = TextStream(Bytes(), list(b"a prompt"))  # type: ignore[arg-type]
    text = " gr\u00fc\u00df dich \U0001f642"
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert stream.add("\u00fc".encode()[0]) == ""
    assert stream.rest() == "\ufffd"


@pytest.mark.parametrize(("trained_seq", "warned"), [(8, True), (20, False), (None, False)])
def test_what_goes_beyond_the_trained_context_is_warned_of(
    trained_seq: int | None, warned: bool, tiny_model: Build, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict = {"max_new_tokens": 2, "trained_seq": trained_seq}
    list(generate_text(tiny_model(), Bytes(), ["seven p"], **options))  # type: ignore[arg-type]
    assert ("may take 10 tokens, the model was trained on contexts of 8" in caplog.text) == warned
