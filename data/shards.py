"""Token shards: flat files of token ids that are memory-mapped, an index of documents, and `meta.json`."""

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from dash_train.data.errors import DataError
from dash_train.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
INDEX = "documents.bin"
META = "meta.json"


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

    def __init__(self, folder: Path, tokenizer: Tokenizer, sources: list[str], shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.tokenizer = tokenizer
        self.sources = sources
        self.shard_tokens = shard_tokens
        self.dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self.documents = self.tokens = self.text_bytes = 0
        self._index = array("q")  # tokens and source of every document, in turn
        self._shards: list[ShardFile] = []
        self._open_shard()

    def add(self, ids: list[int], source: int, text_bytes: int) -> None:
        """Append a document as BOS, its tokens, EOS. A document never crosses from one shard into the next."""
        if self._shard_tokens >= self.shard_tokens:
            self._close_shard()
            self._open_shard()
        tokens = np.array([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id], dtype=self.dtype)
        self._shard.write(tokens.tobytes())
        self._hash.update(tokens.tobytes())
        self._shard_tokens += len(tokens)
        self._index.extend((len(tokens), source))
        self.documents += 1
        self.tokens += len(tokens)
        self.text_bytes += text_bytes

    def close(self) -> ShardsMeta:
        """Finish the last shard, write the index and `meta.json`."""
        self._close_shard()
        index = self.folder / INDEX
        index.write_bytes(self._index)
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
            index=ShardFile(INDEX, index.stat().st_size, hashlib.sha256(self._index).hexdigest()),
            shards=self._shards,
        )
        (self.folder / META).write_text(json.dumps(asdict(meta), indent=1))
        return meta

    def _open_shard(self) -> None:
        self._shard = (self.folder / _shard_name(len(self._shards))).open("wb")
        self._hash = hashlib.sha256()
        self._shard_tokens = 0

    def _close_shard(self) -> None:
        self._shard.close()
        path = Path(self._shard.name)
        size = path.stat().st_size
        self._shards.append(ShardFile(path.name, size, self._hash.hexdigest(), self._shard_tokens))


class TokenShards:
    """A split opened for reading. `lengths` and `sources` are int64 `[documents]`; nothing is read until asked for."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `ShardWriter` wrote; a missing or truncated file is a `DataError` that names it."""
        self.meta = read_meta(folder)
        for file in [self.meta.index, *self.meta.shards]:
            check_size(folder / file.name, file.bytes, folder.parent)
        index = np.fromfile(folder / INDEX, dtype=np.int64).reshape(-1, 2)
        self.lengths: npt.NDArray[np.int64] = index[:, 0]
        self.sources: npt.NDArray[np.int64] = index[:, 1]
        self._shards = [
            np.memmap(folder / shard.name, dtype=self.meta.dtype, mode="r") for shard in self.meta.shards if shard.bytes
        ]
        self._shard_starts = np.cumsum([0] + [shard.tokens for shard in self.meta.shards if shard.bytes])
        self._starts = np.cumsum(self.lengths) - self.lengths

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens `start` to `stop` of a document, cut off at its end."""
        first = self._starts[document]
        shard = int(np.searchsorted(self._shard_starts, first, side="right")) - 1
        first -= self._shard_starts[shard]
        stop = min(stop, int(self.lengths[document]))
        return self._shards[shard][first + start : first + stop].astype(np.int64)

    def digest(self) -> str:
        """Return one hash over the contents of all files."""
        hashes = [file.sha256 for file in [self.meta.index, *self.meta.shards]]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


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
