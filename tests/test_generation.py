from collections.abc import Callable

import pytest

from dash_train.errors import UserError
from dash_train.generation import TextStream, generate
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]

PROMPTS = [[1, 2, 3], list(range(30)), [5] * 47, [9]]


@pytest.mark.parametrize("attention", ["full", "dash"])
def test_cache_changes_nothing(attention: str, tiny_model: Build) -> None:
    """Ragged prompts, over several chunk boundaries (the chunk is 16)."""
    model = tiny_model(attention)
    cached, plain = (
        list(generate(model, PROMPTS, max_new_tokens=36, use_cache=use_cache)) for use_cache in (True, False)
    )
    assert cached == plain
    assert len(cached) == 36


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


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict, tiny_model: Build) -> None:
    with pytest.raises(UserError, match=f"found .*{next(iter(wrong))}"):
        list(generate(tiny_model(), [[1]], **{"max_new_tokens": 1, **wrong}))


def test_an_empty_prompt_is_refused(tiny_model: Build) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        list(generate(tiny_model(), [[1], []], max_new_tokens=1))


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes, and which drops a space in front."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def test_streamed_text_is_whole_characters() -> None:
    stream = TextStream(Bytes(), list(b"a prompt"))  # type: ignore[arg-type]
    text = " gr\u00fc\u00df dich \U0001f642"
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert stream.add("\u00fc".encode()[0]) == ""
    assert stream.rest() == "\ufffd"
