"""Generation: prompts in, one token a row and step out; or texts in, texts out."""

import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.decode_step import DecodeStep
from dash_train.model.cache import PIECE_SIZE, Cache, Decoding, Sampling
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

logger = logging.getLogger(__name__)


def read_prompts_file(path: Path) -> list[str]:
    r"""The prompts of a UTF-8 file, one a line; in a file named .jsonl a line is a JSON string or {"prompt": ...}.

    Lines end with "\n" or "\r\n" and nothing else; a byte-order mark is no part of the first.

    Raises:
        UserError: the file is not there, a line is not UTF-8 or holds no prompt, or there is no line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not lines[-1]:
        del lines[-1]
    if not lines:
        raise UserError(f"{path}: holds no prompt; expected one a line")
    is_json = path.suffix == ".jsonl"
    return [_prompt_of(line.removesuffix(b"\r"), is_json, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def _prompt_of(line: bytes, is_json: bool, where: str) -> str:
    try:
        text = line.decode()
        found = json.loads(text) if is_json else text
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise UserError(f'{where}: expected a string or {{"prompt": a string}}')
    return prompt


def choose_decoding(
    config: ModelConfig,
    mode: str | None = None,
    *,
    epsilon: float = Decoding.epsilon,
    delta: float = Decoding.delta,
    verify: str = Decoding.verify,
    routing_every: int | None = None,
    **sampling: Any,
) -> Decoding:
    """How to decode a model: `full`, `dash` or `vattention`; None is `dash` where it has Dash layers, else `full`.

    `sampling` are fields of `Sampling`.

    Raises:
        UserError: the model cannot be decoded in that way, or a value is none that there is.
    """
    has_dash = any(config.attention_type(layer) == "dash" for layer in range(config.layers))
    mode = mode or ("dash" if has_dash else "full")
    if mode == "dash" and not has_dash:
        raise UserError("decode: 'dash' needs a model with Dash layers, all of this one's have full attention")
    if mode not in ("full", "dash", "vattention") or verify not in ("output", "denominator"):
        raise UserError(
            f"expected decode full, dash or vattention and verify output or denominator; found {mode}, {verify}"
        )
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise UserError(f"expected epsilon and delta between 0 and 1; found epsilon {epsilon}, delta {delta}")
    if routing_every is not None and (routing_every < 1 or routing_every & (routing_every - 1)):
        raise UserError(f"expected routing_every a power of two, or none; found {routing_every}")
    for name in ("heavy", "max_sample"):
        if not 0 <= sampling.get(name, 0) <= 1:
            raise UserError(f"expected {name} from 0 to 1, a share; found {sampling[name]}")
    for name, least in (("sink", 0), ("window", 0), ("base_sample", 2), ("value_floor", 0)):
        if not sampling.get(name, least) >= least:
            raise UserError(f"expected {name} of at least {least}; found {sampling[name]}")
    return Decoding(mode, epsilon, delta, verify, routing_every, Sampling(**sampling))  # type: ignore[arg-type]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    decoding: Decoding | None = None,
    piece_size: int = PIECE_SIZE,
    use_graph: bool = True,
    report: DecodeReport | None = None,
) -> Iterator[list[int | None]]:
    """Continue the prompts; yields each step's new tokens, one a row, None for rows that have finished.

    Args:
        prompts: token ids, at least one a prompt; the lengths may differ.
        max_new_tokens: steps at most; the generation ends before when every row has given an `eos_id`.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: a row's samples, of tokens and of keys, depend on it and on the row's index, not on the other rows.
        eos_id: the token that ends a row (it is yielded), or several of which any does.
        vocab_size: tokens of the tokenizer; what the model has above them, as padding of its vocabulary, is never
            drawn. None draws from all.
        decoding: how steps attend (default: every layer in its own way).
        piece_size: prompts are read in pieces of so many tokens.
        use_graph: False runs every step eagerly on CUDA too, to the same tokens.
        report: filled in at the end.

    Raises:
        UserError: there is no prompt, one is empty, or a number is out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or seed < 0 or piece_size < 1:
        raise UserError(
            "expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, seed >= 0 and piece_size >= 1; found "
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}, seed {seed}, "
            f"piece_size {piece_size}"
        )
    if not prompts:
        raise UserError("no prompts: expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: expected at least one token, such as the tokenizer's <bos>")
    parameter = next(model.parameters())
    generators = [_generator(seed, row, parameter.device) for row in range(len(prompts))]
    cache = Cache.allocate(
        model.config,
        len(prompts),
        max(map(len, prompts)) + max_new_tokens,
        parameter.dtype,
        parameter.device,
        decoding=decoding,
        piece_size=piece_size,
        requests=[_mixed(seed, row, bits=63) for row in range(len(prompts))],
    )
    step = DecodeStep(model, cache, use_graph=use_graph)

    started = time.perf_counter()
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    finished = [False] * len(prompts)
    count = 0
    logits = read_prompts(model, prompts, cache)
    tokens = _sample(logits[:, :vocab_size], temperature, top_p, generators)
    prompts_read = time.perf_counter()
    for remaining in reversed(range(max_new_tokens)):
        ids = tokens.tolist()
        yield [None if done else token for token, done in zip(ids, finished, strict=True)]
        count += finished.count(False)
        ended = [done or token in ends for token, done in zip(ids, finished, strict=True)]
        if all(ended) or not remaining:
            break
        if ended != finished:
            finished = ended
            cache.counted.copy_(torch.tensor([not done for done in finished]))
        tokens = _sample(step(tokens)[:, :vocab_size], temperature, top_p, generators)
    if report is not None:
        report.count(cache)
        report.tokens, report.prompt_seconds = count, prompts_read - started
        report.seconds = time.perf_counter() - prompts_read


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    eos_ids: Collection[int] = (),
    trained_seq: int | None = None,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Continue texts; yields (row, new text) as it comes, never half a character.

    Args:
        eos_ids: tokens that end a row beside the tokenizer's own.
        trained_seq: tokens of the longest context that the model was trained on; what goes beyond is warned of.
        options: those of `generate`.
    """
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, rows), default=0) + options["max_new_tokens"]
    if trained_seq is not None and longest > trained_seq:
        logger.warning(
            f"warning: the longest prompt and its continuation may take {longest} tokens, the model was trained on "
            f"contexts of {trained_seq}: what it writes beyond them may make no sense"
        )
    streams = [TextStream(tokenizer, row) for row in rows]
    ends = {tokenizer.eos_id, *eos_ids}
    for tokens in generate(model, rows, eos_id=ends, vocab_size=tokenizer.vocab_size, **options):
        for row, token in enumerate(tokens):
            if token is not None and (text := streams[row].add(token)):
                yield row, text
    for row, stream in enumerate(streams):
        if text := stream.rest():
            yield row, text


class TextStream:
    """The text of a growing list of tokens, piece by piece.

    Tokens are decoded together with those of the piece before, since a decoder may treat the first one differently; and
    text that ends inside a UTF-8 character waits for the tokens that complete it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.before = prompt  # whose text is out
        self.waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that one more token makes ready; empty while a character is incomplete."""
        self.waiting.append(token)
        text = self._waiting_text()
        if text.endswith("\ufffd"):
            return ""
        self.before, self.waiting = self.waiting, []
        return text

    def rest(self) -> str:
        """What still waits at the end; broken characters are U+FFFD."""
        return self._waiting_text()

    def _waiting_text(self) -> str:
        before = self.tokenizer.decode(self.before)
        return self.tokenizer.decode(self.before + self.waiting)[len(before) :]


@torch.no_grad()
def read_prompts(model: LanguageModel, prompts: list[list[int]], cache: Cache) -> Tensor:
    """Fill an empty cache with prompts of any lengths; logits `[batch, vocab]` after each."""
    device = cache.lengths.device
    longest = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    logits = model(tokens, real=real, cache=cache)["logits"][:, 0]
    cache.totals.zero_()  # the steps' are wanted
    return logits


def _mixed(seed: int, row: int, bits: int) -> int:
    """A number that depends on both, as a row's own seed."""
    high, low = np.random.SeedSequence([seed, row]).generate_state(2)
    return (int(high) << 32 | int(low)) >> (64 - bits)


def _generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A row's random numbers. The seed has 32 bits, because torch's CPU generator ignores all higher ones."""
    return torch.Generator(device).manual_seed(_mixed(seed, row, bits=32))


def _sample(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """A token a row, `[batch]`, from the logits `[batch, vocab]`; nucleus sampling (arXiv 1904.09751) at top_p < 1."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens together
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    places = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return tokens.gather(1, torch.stack(places)).flatten()
