"""Token shards: flat files of token ids that are memory-mapped, an index of documents, and `meta.json`."""

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    dtype: str
    vocab_size: int
    pad_id: int
    tokenizer_hash: str
    sources: list[str]
    documents: int
    tokens: int
    text_bytes: int
    index: ShardFile
    shards: list[ShardFile]


class ShardWriter:
    """Writes one split into `folder`: `tokens-00000.bin`, ..., `documents.bin` and, at `close`, `meta.json`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, sources: list[str], shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.tokenizer = tokenizer
        self.sources = sources
        self.shard_tokens = shard_tokens
        self.dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
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
        self._shard = (self.folder / f"tokens-{len(self._shards):05d}.bin").open("wb")
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
        self.meta = _read_meta(folder)
        for file in [self.meta.index, *self.meta.shards]:
            _check_size(folder / file.name, file.bytes)
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


def _read_meta(folder: Path) -> ShardsMeta:
    path = folder / META
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found; the folder is not a prepared data set (launch/prepare.py makes one)"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); delete {folder.parent} and prepare again") from error
    if values["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {values['format_version']}, this program reads {FORMAT_VERSION}; "
            f"delete {folder.parent} and prepare again"
        )
    values["index"] = ShardFile(**values["index"])
    values["shards"] = [ShardFile(**shard) for shard in values["shards"]]
    return ShardsMeta(**values)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        state = "is missing" if found is None else f"holds {found} bytes"
        raise DataError(f"{path}: {state}, expected {expected} bytes; delete {path.parent.parent} and prepare again")
