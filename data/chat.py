"""Supervised text: prompts with responses, and chats, as tokens of which the responses alone count in the loss.

A record is {"prompt": ..., "response": ...}, whose response follows its prompt as it is, or {"messages": [{"role": ...,
"content": ...}, ...]}, which the tokenizer's chat template turns into text; what the assistant says is the response.
What a template writes may be special tokens; what merely spells one in a message stays text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dash_train.data.errors import DataError
from dash_train.data.records import Record, Reject, is_encodable
from dash_train.data.shards import NOT_COUNTED
from dash_train.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

ASSISTANT = "assistant"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
DEFAULT_TEMPLATE = (  # ChatML
    "{{ bos_token }}{% for message in messages %}"
    f"{{{{ '{TURN}' + message['role'] + '\\n' + message['content'] + '{TURN_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN}{ASSISTANT}\\n' }}}}{{% endif %}}"
)
# What stands in a message for text that spells a special token, while the template is at work: the number of the text
# between two characters for private use, the first of which is itself such a text.
OPEN, CLOSE = "\ue000", "\ue001"
STAND_IN = re.compile(f"{OPEN}(\\d+){CLOSE}")


class ConversationOf:
    """The conversation of a record, as the canonical JSON that `encode_conversations` reads."""

    fields = ("messages", "prompt", "response")

    def of(self, record: Record, reject: Reject) -> str | None:
        """Return the conversation of a record, or reject the record."""
        values, origin = record
        problem = _problem_of(values)
        if problem is not None:
            reject(f"{origin}: {problem}")
            return None
        kept = {name: values[name] for name in self.fields if values.get(name) is not None}
        return json.dumps(kept, ensure_ascii=False, sort_keys=True)


def _problem_of(values: Any) -> str | None:
    expected = 'expected {"prompt": text, "response": text} or {"messages": [{"role": text, "content": text}, ...]}'
    if not isinstance(values, dict):
        return f"{expected}, found {type(values).__name__}"
    messages = values.get("messages")
    if messages is None:
        texts = [values.get("prompt"), values.get("response")]
    elif not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return f"messages: {expected}"
    else:
        texts = [message.get(name) for message in messages for name in ("role", "content")]
        if not any(message.get("role") == ASSISTANT for message in messages):
            return f"messages: none has the role {ASSISTANT!r}, so nothing counts in the loss"
    if not all(isinstance(text, str) for text in texts):
        return f"{expected}, found {sorted(values)}" if messages is None else f"messages: {expected}"
    if not all(is_encodable(str(text)) for text in texts):
        return "half of a surrogate pair, which is no text"
    return None


def words_of(conversation: str) -> str:
    """What is said in a conversation, for a tokenizer that learns from it."""
    values = json.loads(conversation)
    said = [message["content"] for message in values.get("messages", [])]
    return "\n".join(said or [values["prompt"], values["response"]])


def with_chat_template(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer as a Hugging Face one with a chat template: its own, or the default with its two tokens added.

    The latter is written to `folder`, with the end of a turn among the tokens that end a text.
    """
    from dash_train.data.tokenizer_export import about_prefix, save_for_transformers, to_huggingface

    if isinstance(tokenizer, SentencePieceTokenizer):
        theirs = to_huggingface(tokenizer.model)
        companions, added = {"tokenizer.model": tokenizer.model}, about_prefix(tokenizer.model)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        theirs, companions, added = tokenizer.tokenizer, dict(tokenizer.companions), {}
        if theirs.chat_template:
            return tokenizer
    theirs.add_tokens([TURN, TURN_END], special_tokens=True)
    theirs.chat_template = DEFAULT_TEMPLATE
    generation = json.loads(companions.get("generation_config.json", b"{}"))
    before = generation.get("eos_token_id", tokenizer.eos_id)
    ends = [*(before if isinstance(before, list) else [before]), theirs.convert_tokens_to_ids(TURN_END)]
    generation["eos_token_id"] = list(dict.fromkeys(ends))
    companions["generation_config.json"] = json.dumps(generation, indent=2).encode()
    save_for_transformers(theirs, folder, companions, **added)
    return HuggingFaceTokenizer(folder)


def encode_conversations(
    texts: Sequence[str], tokenizer: Tokenizer, reject: Reject
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The documents of conversations, one after the other, and the tokens of each.

    A document is BOS, the conversation and EOS; `NOT_COUNTED` is added to all that is no response. The EOS after a
    response to a prompt counts: it is how the response ends. What the template cannot say is rejected.
    """
    encoder = _Encoder(tokenizer)
    documents = []
    for text in texts:
        try:
            documents.append(encoder.document(json.loads(text)))
        except DataError as error:
            reject(f"{error}, in {text[:80]}...")
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return np.concatenate([np.empty(0, np.uint32), *documents]), lengths


class _Some(NamedTuple):
    """A token, and where in a rendered conversation its text begins."""

    id: int
    start: int


class _Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def document(self, conversation: dict[str, Any]) -> npt.NDArray[np.uint32]:
        if "messages" in conversation:
            ids, counted = self._chat(conversation["messages"])
            end_counts = False
        else:
            prompt, whole = (self.tokenizer.encode(text) for text in self._prompt_and_whole(conversation))
            if whole[: len(prompt)] != prompt:  # a token would reach from the prompt into its response
                whole = prompt + self.tokenizer.encode(conversation["response"])
            ids, counted = whole, [place >= len(prompt) for place in range(len(whole))]
            end_counts = True
        tokens = np.array([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id], dtype=np.uint32)
        tokens[~np.array([False, *counted, end_counts])] |= NOT_COUNTED
        return tokens

    @staticmethod
    def _prompt_and_whole(conversation: dict[str, Any]) -> tuple[str, str]:
        return conversation["prompt"], conversation["prompt"] + conversation["response"]

    def _chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """The ids of a chat without BOS, and which are a response's."""
        hidden = [{name: self._hide(value) for name, value in message.items()} for message in messages]
        text = self._render(hidden, prompts=False)
        spans = [
            self._span(text, hidden, place) for place, message in enumerate(messages) if message["role"] == ASSISTANT
        ]
        tokens = list(self._tokens(text))
        if tokens and tokens[0].id == self.tokenizer.bos_id:
            del tokens[0]
        counted = [any(start <= token.start < end for start, end in spans) for token in tokens]
        return [token.id for token in tokens], counted

    def _span(self, text: str, messages: list[dict[str, Any]], place: int) -> tuple[int, int]:
        """From where to where in the text a message of the assistant is its response: what comes after the prompt that
        the template ends with when it is the assistant's turn."""
        before, after = self._render(messages[:place], prompts=True), self._render(messages[: place + 1], prompts=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"message {place}: the chat template writes what came before it in another way, so its response cannot "
                "be told; end the chat with it"
            )
        return len(before), len(after)

    def _render(self, messages: list[dict[str, Any]], *, prompts: bool) -> str:
        assert isinstance(self.tokenizer, HuggingFaceTokenizer)
        try:
            return str(
                self.tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
            )
        except Exception as error:  # of many kinds: templates raise what they like
            raise DataError(f"the chat template refuses it ({' '.join(str(error).split())})") from error

    @cached_property
    def _special(self) -> list[str]:
        """What has to be hidden from a template: what begins a stand-in, and special tokens, the longest first."""
        assert isinstance(self.tokenizer, HuggingFaceTokenizer)
        added = self.tokenizer.tokenizer.added_tokens_decoder.values()
        spelled = {token.content for token in added if token.special}
        return [OPEN, *sorted(spelled, key=lambda text: (-len(text), text))]

    def _hide(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pattern = "|".join(map(re.escape, self._special))
        return re.sub(pattern, lambda found: f"{OPEN}{self._special.index(found[0])}{CLOSE}", value)

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer, but that text which spells a special token is that token."""
        assert isinstance(self.tokenizer, HuggingFaceTokenizer)
        backend = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _tokens(self, text: str) -> Iterator[_Some]:
        """The tokens of a rendered chat, with its stand-ins as what they stand for."""
        begin = 0
        for found in STAND_IN.finditer(text):
            yield from self._tokens_of_template(text[begin : found.start()], begin)
            for token in self.tokenizer.encode(self._special[int(found[1])]):
                yield _Some(token, found.start())
            begin = found.end()
        yield from self._tokens_of_template(text[begin:], begin)

    def _tokens_of_template(self, text: str, begin: int) -> Iterator[_Some]:
        if text:
            encoding = self._backend.encode(text, add_special_tokens=False)
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                yield _Some(token, begin + start)
