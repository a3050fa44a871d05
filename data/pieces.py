"""Pieces: the tokens of some megabytes of text, each kept as soon as it is made.

So a preparation that was stopped goes on where it stopped, and several jobs can share one. What a piece holds depends
on the part of the source that it is of; one after the other they are the corpus, whoever made them.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dash_train.data.chat import encode_conversations
from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.shards import token_type, with_ends
from dash_train.data.sources import Document, Part, read_part
from dash_train.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20  # of text: some seconds of work
LOG_SECONDS = 10.0
SPLITS = ("train", "validation")


class BadDocuments:
    """What to do with a malformed document: `error` raises, `skip` logs and counts it."""

    def __init__(self, on_bad_document: str) -> None:
        self.raises = on_bad_document == "error"
        self.skipped: set[str] = set()
        self._recent: list[str] = []

    def reject(self, message: str) -> None:
        if self.raises:
            raise DataError(f"{message}; mend it, or set data.on_bad_document: skip")
        self._recent.append(message)
        if message not in self.skipped:  # the sources are read twice: for the tokenizer, then for the shards
            self.skipped.add(message)
            logger.warning("skipped %s", message)

    def take(self) -> list[str]:
        """Return the messages since the last call."""
        recent, self._recent = self._recent, []
        return recent


class Task(NamedTuple):
    """A part of a source to tokenize, the number of that source, and which split a text belongs to (None: neither)."""

    source: SourceConfig
    number: int
    part: Part
    split_of: Callable[[str], str | None]


@dataclass
class Piece:
    """Documents of one part of a source: their tokens and lengths by split.

    `documents` counts all that were read, `text_bytes` the UTF-8 bytes of those in a split; `skipped` says which were
    malformed.
    """

    tokens: dict[str, npt.NDArray[Any]]
    lengths: dict[str, npt.NDArray[np.int64]]
    text_bytes: dict[str, int]
    documents: int
    skipped: list[str]

    def save(self, path: Path) -> None:
        """Write all at once, or nothing."""
        about = {"text_bytes": self.text_bytes, "documents": self.documents, "skipped": self.skipped}
        arrays: dict[str, Any] = {f"tokens_{split}": tokens for split, tokens in self.tokens.items()}
        arrays |= {f"lengths_{split}": lengths for split, lengths in self.lengths.items()}
        unfinished = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}")
        with unfinished.open("wb") as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Piece":
        """Read what `save` wrote."""
        with np.load(path) as saved:
            tokens, lengths = ({split: saved[f"{what}_{split}"] for split in SPLITS} for what in ("tokens", "lengths"))
            return cls(tokens, lengths, **json.loads(saved["about"].tobytes()))


class Pieces:
    """The pieces of a corpus, in a folder that is named by how the corpus is divided: `000012-000003.npz` is the
    fourth one of task 12, `000012-000004-last.npz` its last one."""

    def __init__(self, work: Path, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        divided = [[str(file) for file in task.part.files] + [task.part.first, task.part.stop] for task in tasks]
        digest = hashlib.sha256(json.dumps([PIECE_BYTES, divided]).encode()).hexdigest()[:16]
        self.folder = work / f"pieces-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[int]:
        """Return the tasks that are not done."""
        done = {path.name.partition("-")[0] for path in self.folder.glob("*-last.npz")}
        return [number for number in range(len(self.tasks)) if f"{number:06d}" not in done]

    def all(self) -> Iterator[tuple[Task, Piece]]:
        """Yield every piece that is there, in order, with its task."""
        for path in sorted(self.folder.glob("*.npz")):
            yield self.tasks[int(path.name.partition("-")[0])], Piece.load(path)

    def of(self, task: int) -> Iterator[Piece]:
        """Yield the pieces of a task that are there."""
        return (Piece.load(path) for path in sorted(self.folder.glob(f"{task:06d}-*.npz")))

    def make(self, tasks: Iterable[int], tokenizer: Tokenizer, threads: int, bad: BadDocuments) -> None:
        """Make the pieces of some tasks, as far as they are not there yet."""
        tasks = list(tasks)
        missing = set(self.missing())
        progress = _Progress([self.tasks[number].part.size for number in tasks])
        for number in tasks:
            if number not in missing:
                progress.found(self.tasks[number].part.size)
                continue
            for piece, last in self._make(number, tokenizer, threads, bad):
                progress.made(piece, self.tasks[number].part.size, last)
                progress.log(bad)

    def _make(self, number: int, tokenizer: Tokenizer, threads: int, bad: BadDocuments) -> Iterator[tuple[Piece, bool]]:
        task = self.tasks[number]
        before = list(self.of(number))
        for piece in before:
            bad.skipped |= set(piece.skipped)
        documents = read_part(task.source, task.part, bad.reject)
        known = sum(piece.documents for piece in before)
        next(islice(documents, known, known), None)  # they are read again, which is quick, and passed over
        bad.take()
        for place, (batch, last) in enumerate(_batches(documents), start=len(before)):
            piece = _tokenize(batch, task, tokenizer, threads, bad)
            piece.skipped = bad.take()
            piece.save(self.folder / f"{number:06d}-{place:06d}{'-last' if last else ''}.npz")
            yield piece, last


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[Document], bool]]:
    """Group documents into lists of about `PIECE_BYTES` of text, and say which is the last one."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if size >= PIECE_BYTES:
            yield batch, False
            batch, size = [], 0
        batch.append(document)
        size += len(document.text.encode("utf-8"))
    yield batch, True


def _tokenize(batch: list[Document], task: Task, tokenizer: Tokenizer, threads: int, bad: BadDocuments) -> Piece:
    texts: dict[str | None, list[str]] = {"train": [], "validation": [], None: []}
    for document in batch:
        texts[task.split_of(document.text)].append(document.text)
    tokens, lengths, text_bytes = {}, {}, {}
    for split in SPLITS:
        tokens[split], lengths[split] = encode(texts[split], task.source, tokenizer, threads, bad)
        text_bytes[split] = sum(len(text.encode("utf-8")) for text in texts[split])
    return Piece(tokens, lengths, text_bytes, len(batch), [])


def encode(
    texts: list[str], source: SourceConfig, tokenizer: Tokenizer, threads: int, bad: BadDocuments
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The documents of texts of a source, one after the other, and the tokens of each."""
    if source.supervised:
        return encode_conversations(texts, tokenizer, bad.reject)
    return with_ends(tokenizer.encode_batch(texts, threads), tokenizer, token_type(tokenizer))


class _Progress:
    """Says how far the work is and when it will be done, every few seconds. Sizes are in bytes of the sources."""

    def __init__(self, sizes: list[int]) -> None:
        self.total = sum(sizes)
        self.before = self.done = self.current = 0.0
        self.documents = self.tokens = self.text_bytes = 0
        self._text_of_done = self._text_of_current = 0
        self.started = self.logged = time.monotonic()

    def found(self, size: int) -> None:
        """Count a task that was done before."""
        self.before += size

    def made(self, piece: Piece, size: int, last: bool) -> None:
        """Count a piece of a task of some size."""
        text_bytes = sum(piece.text_bytes.values())
        self.documents += piece.documents
        self.tokens += sum(len(tokens) for tokens in piece.tokens.values())
        self.text_bytes += text_bytes
        self._text_of_current += text_bytes
        # Compressed files hold more text than bytes; how much more, those that are done tell.
        bytes_of_text = self.done / self._text_of_done if self._text_of_done else 1.0
        self.current = min(self._text_of_current * bytes_of_text, size)
        if last:
            self.done, self.current = self.done + size, 0.0
            self._text_of_done += self._text_of_current
            self._text_of_current = 0

    def log(self, bad: BadDocuments) -> None:
        now = time.monotonic()
        if now - self.logged < LOG_SECONDS:
            return
        self.logged = now
        seconds = now - self.started
        here = self.done + self.current
        share = (self.before + here) / self.total if self.total else 0.0
        left = f"{_duration((self.total - self.before - here) * seconds / here)} left" if here else "size unknown"
        logger.info(
            "tokenized %.1f %%, %s: %s documents, %s tokens, %.1f MB of text a second, %d skipped",
            100 * share,
            left,
            f"{self.documents:,}",
            f"{self.tokens:,}",
            self.text_bytes / seconds / 1e6,
            len(bad.skipped),
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
