"""What a prepared corpus holds, as text and as a figure: counts, lengths, exact duplicates, samples."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dash_train.data.integrity import SPLITS
from dash_train.data.loader import RowDataset
from dash_train.data.mixture import Mixture
from dash_train.data.shards import SCAN, TokenShards
from dash_train.data.tokenizer import Tokenizer, load_tokenizer

SAMPLES = 3
SHOWN = 300  # characters of a sample

Ints = npt.NDArray[np.int64]


def describe_split(split: str, rows: RowDataset | Mixture) -> str:
    """Say in a line how much a split holds."""
    meta = rows.shards.meta
    return (
        f"{split}: {meta.documents:,} documents, {meta.tokens:,} tokens, {meta.text_bytes / meta.tokens:.2f} bytes "
        f"per token, {rows.rows(0):,} rows of {rows.seq:,} tokens, {rows.fill():.1%} full"
    )


def write_report(folder: Path, datasets: Mapping[str, RowDataset | Mixture]) -> str:
    """Write `report.txt` and `report.png` into a prepared folder and return the text. Every token is read once."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    lines = []
    hashes = {split: hash_documents(dataset.shards) for split, dataset in datasets.items()}
    for split, dataset in datasets.items():
        lines += [describe_split(split, dataset), *(f"  {line}" for line in dataset.summary())]
        lines += ["", *_length_table(dataset.shards), ""]
    lines += [*_duplicates(hashes), ""]
    for split, dataset in datasets.items():
        lines += _samples(split, dataset.shards, tokenizer)
    text = "\n".join(lines)
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    _draw(folder / "report.png", datasets)
    return text


def length_histogram(shards: TokenShards) -> tuple[Ints, Ints]:
    """Count documents by length, bin b from 2**b tokens on: how many there are, and how many tokens they hold."""
    documents, tokens = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=np.int64)
    for first in range(0, shards.meta.documents, SCAN):
        lengths = shards.index(first, first + SCAN)[0]
        bins = np.frexp(lengths)[1] - 1
        documents += np.bincount(bins, minlength=64)
        tokens += np.bincount(bins, lengths, minlength=64).astype(np.int64)
    last = int(np.flatnonzero(documents)[-1]) + 1
    return documents[:last], tokens[:last]


def hash_documents(shards: TokenShards) -> npt.NDArray[np.uint64]:
    """Hash the tokens of every document, uint64 `[documents]`: those of equal documents are equal."""
    return np.fromiter(_hashes(shards), dtype=np.uint64, count=shards.meta.documents)


def _hashes(shards: TokenShards) -> Iterator[int]:
    place = 0
    for first in range(0, shards.meta.documents, SCAN):
        for length in shards.index(first, first + SCAN)[0].tolist():
            digest = hashlib.blake2b(shards.read(place, length).tobytes(), digest_size=8).digest()
            yield int.from_bytes(digest, "little")
            place += length


def _length_table(shards: TokenShards) -> list[str]:
    documents, tokens = length_histogram(shards)
    lines = [f"  {'tokens':>22} {'documents':>14} {'of all':>7} {'of tokens':>9}"]
    for number in np.flatnonzero(documents).tolist():
        name = f"{2**number:,} to {2 ** (number + 1) - 1:,}"
        shares = f"{documents[number] / documents.sum():>7.1%} {tokens[number] / tokens.sum():>9.1%}"
        lines.append(f"  {name:>22} {documents[number]:>14,} {shares}")
    return lines


def _duplicates(hashes: dict[str, npt.NDArray[np.uint64]]) -> list[str]:
    lines = []
    for split, of_split in hashes.items():
        copies = len(of_split) - len(np.unique(of_split))
        lines.append(
            f"exact duplicates in {split}: {copies:,} of {len(of_split):,} documents ({copies / len(of_split):.2%})"
        )
    shared = np.isin(hashes["train"], hashes["validation"]).sum()
    lines.append(f"documents of train that are also in validation: {shared:,}")
    return lines


def _samples(split: str, shards: TokenShards, tokenizer: Tokenizer) -> list[str]:
    """Show the beginnings of some documents, the same ones every time."""
    count = min(SAMPLES, shards.meta.documents)
    chosen = np.sort(np.random.default_rng(0).choice(shards.meta.documents, count, replace=False)).tolist()
    lines = []
    for document in chosen:
        ids = shards.tokens(document, 0, SHOWN + 2)
        text = tokenizer.decode(ids.tolist())[:SHOWN]
        length = int(shards.index(document, document + 1)[0][0])
        lines.append(f"document {document:,} of {split}, {length:,} tokens:")
        lines += [f"  | {line}" for line in text.splitlines()]
    return lines


def _draw(path: Path, datasets: Mapping[str, RowDataset | Mixture]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(SPLITS), 2, figsize=(12, 7), layout="constrained", squeeze=False)
    for (split, dataset), (left, right) in zip(datasets.items(), axes, strict=True):
        documents, tokens = length_histogram(dataset.shards)
        edges = np.arange(len(documents))
        left.bar(edges - 0.2, documents / documents.sum(), 0.4, label="of the documents")
        left.bar(edges + 0.2, tokens / tokens.sum(), 0.4, label="of the tokens")
        left.set(
            title=f"{split}: {dataset.shards.meta.documents:,} documents", xlabel="tokens, at least", ylabel="share"
        )
        left.set_xticks(
            edges[::2], [f"{2**edge:,}" if edge < 10 else f"{2 ** (edge - 10):,}K" for edge in edges[::2].tolist()]
        )
        left.legend()
        names = [name if len(name) < 40 else f"...{name[-37:]}" for name in dataset.shards.meta.sources]
        right.barh(names, dataset.shards.source_tokens)
        right.invert_yaxis()
        right.set(title=f"{split}: {dataset.shards.meta.tokens:,} tokens, {dataset.fill():.1%} full", xlabel="tokens")
    figure.savefig(path, dpi=100)
    plt.close(figure)
