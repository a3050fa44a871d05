"""Token shards: flat files of token ids that are read in places, an index of documents, and `meta.json`."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from dash_train.data.errors import DataError
from dash_train.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
INDEX = "documents.bin"
META = "meta.json"
RUN = 256  # documents that are found together
SCAN = 2**18  # documents of the index that are read at a time
OPEN_FILES = 64
NOT_COUNTED = np.uint32(1 << 31)  # added to ids that do not count in the loss, of a supervised split


@dataclass(frozen=True)
class ShardFile:
    """A file of a split: its name, its size, the SHA-256 of its contents and, for a shard, the tokens it holds."""

    name: str
    bytes: int
    sha256: str
    tokens: int = 0


@dataclass(frozen=True)
class ShardsMeta:
    """What `meta.json` holds. `tokens` counts BOS and EOS; `text_bytes` is the UTF-8 size of the text."""

    format_version: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    pad_id: Annotated[int, Field(ge=0)]
    tokenizer_hash: str
    sources: Annotated[list[str], Field(min_length=1)]
    documents: int
    tokens: int
    text_bytes: int
    index: ShardFile
    shards: Annotated[list[ShardFile], Field(min_length=1)]
    supervised: bool = False
    """Whether ids have `NOT_COUNTED` added where they do not count in the loss."""

    def consistent(self) -> bool:
        """Whether its numbers and names agree with each other."""
        width = np.dtype(self.dtype).itemsize
        return (
            self.index.name == INDEX
            and self.index.bytes == 16 * self.documents
            and [shard.name for shard in self.shards] == [_shard_name(i) for i in range(len(self.shards))]
            and all(shard.bytes == width * shard.tokens for shard in self.shards)
            and sum(shard.tokens for shard in self.shards) == self.tokens
            and self.pad_id < self.vocab_size
        )


class ShardWriter:
    """Writes one split into `folder`: `tokens-00000.bin`, ..., `documents.bin` and, at `close`, `meta.json`."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, sources: list[str], shard_tokens: int, supervised: bool = False
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.tokenizer = tokenizer
        self.sources = sources
        self.shard_tokens = shard_tokens
        self.supervised = supervised
        self.dtype: Literal["uint16", "uint32"] = "uint32" if supervised else token_type(tokenizer)
        self.documents = self.tokens = self.text_bytes = 0
        self._index = _HashedFile(folder / INDEX)  # tokens and source of every document, in turn
        self._shards: list[ShardFile] = []
        self._shard = _HashedFile(folder / _shard_name(0))

    def add(self, ids: Sequence[int], source: int, text_bytes: int) -> None:
        """Append a document as BOS, its tokens, EOS."""
        self.extend(*with_ends([ids], self.tokenizer, self.dtype), source, text_bytes)

    def extend(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], source: int, text_bytes: int) -> None:
        """Append documents of one source, the tokens of which follow each other.

        A document never crosses from one shard into the next: a shard that is full ends with the document that made
        it so.
        """
        ends = np.cumsum(lengths)
        begun = 0
        while begun < len(tokens):
            room = self.shard_tokens - self._shard_tokens
            if room <= 0:
                self._close_shard()
                self._shard = _HashedFile(self.folder / _shard_name(len(self._shards)))
                continue
            end = int(ends[min(int(np.searchsorted(ends, begun + room)), len(ends) - 1)])
            self._shard.write(tokens[begun:end].astype(self.dtype, copy=False).tobytes())
            begun = end
        self._index.write(np.stack([lengths, np.full_like(lengths, source)], axis=1).tobytes())
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.text_bytes += text_bytes

    @property
    def _shard_tokens(self) -> int:
        return self._shard.size // np.dtype(self.dtype).itemsize

    def close(self) -> ShardsMeta:
        """Finish the last shard, write the index and `meta.json`."""
        self._close_shard()
        meta = ShardsMeta(
            format_version=FORMAT_VERSION,
            dtype=self.dtype,
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id,
            tokenizer_hash=self.tokenizer.hash,
            sources=self.sources,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            index=self._index.close(),
            shards=self._shards,
            supervised=self.supervised,
        )
        (self.folder / META).write_text(json.dumps(asdict(meta), indent=1))
        return meta

    def _close_shard(self) -> None:
        tokens = self._shard_tokens
        self._shards.append(replace(self._shard.close(), tokens=tokens))


class _HashedFile:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> ShardFile:
        self._file.close()
        return ShardFile(self.path.name, self.size, self._hash.hexdigest())


def token_type(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """Return how the ids of a tokenizer are stored."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def with_ends(
    documents: Sequence[Sequence[int]], tokenizer: Tokenizer, dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Put the tokens of documents one after the other, each between BOS and EOS; and return how many each has."""
    lengths = np.array([len(ids) + 2 for ids in documents], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = tokenizer.bos_id, tokenizer.eos_id
    for ids, end in zip(documents, ends.tolist(), strict=True):
        tokens[end - 1 - len(ids) : end - 1] = ids
    return tokens, lengths


class TokenShards:
    """A split opened for reading, in memory that does not grow with it: 8 bytes for every `RUN` documents.

    `source_starts` is int64 `[sources + 1]`, the first document of each source; `source_tokens` is its tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder that `ShardWriter` wrote; a missing or truncated file is a `DataError` that names it."""
        self.meta = read_meta(folder)
        for file in [self.meta.index, *self.meta.shards]:
            check_size(folder / file.name, file.bytes, folder.parent)
        self.folder = folder
        self.dtype = np.dtype(self.meta.dtype)
        self._index = _File(folder / INDEX)
        self._shard_starts = np.cumsum([0] + [shard.tokens for shard in self.meta.shards])
        self._open_shard = lru_cache(OPEN_FILES)(lambda number: _File(folder / self.meta.shards[number].name))
        self._scan()

    def _scan(self) -> None:
        """Read the index once, for the place of every `RUN`-th document and the bounds of the sources."""
        runs, documents = [], np.zeros(len(self.meta.sources), dtype=np.int64)
        self.source_tokens = np.zeros(len(self.meta.sources), dtype=np.int64)
        last = 0
        for first in range(0, self.meta.documents, SCAN):
            lengths, sources = self.index(first, first + SCAN)
            if sources[0] < last or (np.diff(sources) < 0).any() or sources[-1] >= len(documents):
                raise DataError(f"{self.folder / INDEX}: not in the order of its sources; prepare again")
            last = sources[-1]
            here, starts = np.unique(sources, return_index=True)  # sorted already, so it is quick
            documents[here] += np.diff([*starts, len(sources)])
            self.source_tokens[here] += np.add.reduceat(lengths, starts)
            runs.append(np.add.reduceat(lengths, np.arange(0, len(lengths), RUN)))
        self.source_starts = np.cumsum([0, *documents])
        self._run_starts = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *runs]))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of every document: int64 `[documents]`; for small splits."""
        return self.index(0, self.meta.documents)[0]

    @cached_property
    def sources(self) -> npt.NDArray[np.int64]:
        """The source of every document: int64 `[documents]`; for small splits."""
        return self.index(0, self.meta.documents)[1]

    @cached_property
    def whole_index(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The tokens of every document, and the place of the first of each among all tokens; for small splits."""
        lengths = self.lengths
        return lengths, np.cumsum(lengths) - lengths

    def index(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens and the sources of documents `first` to `stop`, int64 `[2, documents]`, cut off at the end
        of the split."""
        entries = np.frombuffer(self._index.read(16 * first, 16 * (stop - first)), dtype=np.int64)
        return entries.reshape(-1, 2).T

    def run(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the tokens of the documents of a run, and the place of the first of each among all tokens."""
        lengths = self.index(number * RUN, (number + 1) * RUN)[0]
        return lengths, self._run_starts[number] + np.cumsum(lengths) - lengths

    def read(self, place: int, count: int) -> npt.NDArray[Any]:
        """Return `count` tokens, which are of one document, from a place among all tokens of the split."""
        tokens = self._read(place, count)
        return tokens & ~NOT_COUNTED if self.meta.supervised else tokens

    def read_labels(self, place: int, count: int, ignore: int) -> npt.NDArray[np.int64]:
        """Return the same, with `ignore` for those that do not count in the loss."""
        tokens = self._read(place, count).astype(np.int64)
        return np.where(tokens & NOT_COUNTED, ignore, tokens) if self.meta.supervised else tokens

    def _read(self, place: int, count: int) -> npt.NDArray[Any]:
        shard = int(np.searchsorted(self._shard_starts, place, side="right")) - 1
        width = self.dtype.itemsize
        data = self._open_shard(shard).read((int(place) - int(self._shard_starts[shard])) * width, int(count) * width)
        return np.frombuffer(data, dtype=self.dtype)

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens `start` to `stop` of a document, cut off at its end."""
        run, place = divmod(int(document), RUN)
        lengths, places = self.run(run)
        return self.read(places[place] + start, min(stop, int(lengths[place])) - start).astype(np.int64)

    def digest(self) -> str:
        """Return one hash over the contents of all files."""
        hashes = [file.sha256 for file in [self.meta.index, *self.meta.shards]]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


class _File:
    """A file that is read in places, by several threads at once. Mapped memory would count as the process's own."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, place: int, size: int) -> bytes:
        """Return `size` bytes from a place on, fewer at the end of the file."""
        data = os.pread(self._descriptor, size, place)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), place + len(data))):
            data += more  # one call gives at most 2 GiB
        return data

    def __del__(self) -> None:
        os.close(self._descriptor)


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def read_meta(folder: Path) -> ShardsMeta:
    """Read the `meta.json` of a split; one that is missing, broken or of another version is a `DataError`."""
    path = folder / META
    again = f"delete {folder.parent} and prepare again"
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: not found; the folder is not a prepared data set (launch/prepare.py makes one)"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {again}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {again}")
    try:
        meta = TypeAdapter(ShardsMeta).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {place}: {first['msg']}; {again}") from error
    if not meta.consistent():
        raise DataError(f"{path}: its counts, sizes and names contradict each other; {again}")
    return meta


def check_size(path: Path, expected: int, folder: Path) -> None:
    """Raise a `DataError` where a file of a prepared folder is missing or of another size."""
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"holds {found} bytes"
        raise DataError(f"{path}: {state}, expected {expected} bytes; delete {folder} and prepare again")
