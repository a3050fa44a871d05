"""Generation: prompts in, one token a row and step out; or texts in, texts out."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.model.cache import Cache
from dash_train.model.transformer import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue the prompts; yields each step's new tokens, one a row, None for rows that have finished.

    Args:
        prompts: token ids, at least one a prompt; the lengths may differ.
        max_new_tokens: steps at most; the generation ends before when every row has given `eos_id`.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: a row's samples depend on it and on the row's index, not on the other rows.
        eos_id: the token that ends a row (it is yielded).
        use_cache: False runs the model on all tokens at every step, a slow reference for the cached way.

    Raises:
        UserError: there is no prompt, one is empty, or a number is out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or seed < 0:
        raise UserError(
            "expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and seed >= 0; found "
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}, seed {seed}"
        )
    if not prompts:
        raise UserError("no prompts: expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: expected at least one token, such as the tokenizer's <bos>")
    parameter = next(model.parameters())
    generators = [_generator(seed, row, parameter.device) for row in range(len(prompts))]
    cache = None
    if use_cache:
        capacity = max(map(len, prompts)) + max_new_tokens
        cache = Cache.allocate(model.config, len(prompts), capacity, parameter.dtype, parameter.device)

    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    logits = _last_logits(model, rows, cache)
    for step in range(max_new_tokens):
        if step:
            newest = torch.tensor([row[-1:] for row in rows], device=parameter.device)
            logits = model(newest, cache=cache)["logits"][:, 0] if cache else _last_logits(model, rows, None)
        tokens = _sample(logits, temperature, top_p, generators)
        yield [None if done else token for token, done in zip(tokens, finished, strict=True)]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        finished = [done or token == eos_id for token, done in zip(tokens, finished, strict=True)]
        if all(finished):
            return


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Continue texts; yields (row, new text) as it comes, never half a character. Arguments as in `generate`."""
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    streams = [TextStream(tokenizer, row) for row in rows]
    for tokens in generate(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    ):
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


def _generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A row's random numbers. The two are mixed into 32 bits, because torch's CPU generator ignores all higher ones."""
    mixed = np.random.SeedSequence([seed, row]).generate_state(1)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def _last_logits(model: LanguageModel, rows: list[list[int]], cache: Cache | None) -> Tensor:
    """Logits `[batch, vocab]` after whole rows of any lengths; a cache, if given, is filled with them."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    if cache is not None:
        return model(tokens, real=real, cache=cache)["logits"][:, 0]
    return model(tokens, real=real)["logits"][torch.arange(len(rows), device=device), lengths - 1]


def _sample(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> list[int]:
    """One token a row from the logits `[batch, vocab]`; nucleus sampling (arXiv 1904.09751) when top_p < 1."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities, tokens = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens together
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    places = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return tokens.gather(1, torch.stack(places)).flatten().tolist()
