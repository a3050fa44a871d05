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
    text stay together. Where that holds out nothing, as in a corpus of a few documents, the text with the lowest hash
    is held out; where it holds out everything, only that one is. A lone text gives its last part, once.
    """
    waiting: list[tuple[float, str, int]] = []  # until both splits have a document
    lowest, highest = 1.0, 0.0  # hashes: equal ones are copies of one text
    for text, source in documents:
        waiting.append((uniform(text, seed), text, source))
        lowest, highest = min(lowest, waiting[-1][0]), max(highest, waiting[-1][0])
        if lowest < validation_fraction <= highest:
            for number, text, source in waiting:
                yield SplitDocument(text, source, "validation" if number < validation_fraction else "train")
            waiting.clear()
    if waiting and lowest == highest:
        _, text, source = waiting[0]
        end = min(round(len(text) * (1 - validation_fraction)), len(text) - 1)
        for _, _, copy_source in waiting:
            yield SplitDocument(text[:end], copy_source, "train")
        yield SplitDocument(text[end:], source, "validation")
    else:
        for number, text, source in waiting:
            yield SplitDocument(text, source, "validation" if number == lowest else "train")


def is_held_out(text: str, seed: int, validation_fraction: float) -> bool:
    """Whether a document of a corpus that is not tiny is held out: `split_documents` says the same of it."""
    return uniform(text, seed) < validation_fraction


def uniform(text: str, seed: int) -> float:
    """Hash a text to [0, 1)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
