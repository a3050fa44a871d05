"""Which documents are held out for validation."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class SplitDocument(NamedTuple):
    """A document's text, the number of its source, and the split that it belongs to."""

    text: str
    source: int
    split: str


def split_documents(
    documents: Iterable[tuple[str, int]], seed: int, validation_fraction: float
) -> Iterator[SplitDocument]:
    """Yield (text, source) pairs with their split, in order.

    A document's split follows from its own text and the seed, so adding others does not move it, and copies of one
    text stay together. Where that leaves a split empty, as in a corpus of a few documents, the document whose hash
    lies nearest goes there; a single document is for training.
    """
    waiting: list[tuple[float, str, int]] = []  # until both splits have a document
    both = False
    for text, source in documents:
        waiting.append((_uniform(text, seed), text, source))
        both = both or min(waiting)[0] < validation_fraction <= max(waiting)[0]
        if both:
            for number, text, source in waiting:
                yield SplitDocument(text, source, "validation" if number < validation_fraction else "train")
            waiting.clear()
    held_out = waiting.index(min(waiting)) if len(waiting) > 1 else None
    for place, (_, text, source) in enumerate(waiting):
        yield SplitDocument(text, source, "validation" if place == held_out else "train")


def _uniform(text: str, seed: int) -> float:
    """Hash a text to [0, 1)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
