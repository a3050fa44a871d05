"""From text to token shards, once: later runs with the same sources and settings find them in the cache."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.integrity import check_contents, remember, write_contents
from dash_train.data.shards import FORMAT_VERSION, ShardWriter, read_meta
from dash_train.data.sources import describe, passed_over, read_documents, source_files
from dash_train.data.split import SplitDocument, split_documents
from dash_train.data.tokenizer import Tokenizer, load_tokenizer, lost_by, train_tokenizer

logger = logging.getLogger(__name__)

REVISION = 2  # rises when the same sources and settings come out otherwise
BATCH_CHARACTERS = 4_000_000  # text that is tokenized at a time
LOG_SECONDS = 10.0


def prepare(config: DataConfig) -> Path:
    """Return the folder of the prepared data, making it first when the cache has none.

    It holds `tokenizer/`, `train/` and `validation/`, and is named by what it is made from: the sources (paths, sizes
    and times of local files), the tokenizer, the split and the shard format. It appears all at once or not at all;
    when two processes make the same one, the first to finish wins and the other's work is dropped.
    """
    cache = Path(config.cache).expanduser()
    folder = cache / cache_key(config)
    earlier = cache / cache_key(config, revision=1)
    for made in (folder, earlier):
        if made.exists() and (made is folder or _still_right(config, made)):
            check_contents(made)
            return made
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        _write(config, unfinished)
        write_contents(unfinished)
        if not folder.exists():
            unfinished.rename(folder)
            remember(folder)
    except OSError as error:
        if not folder.exists():  # else another process renamed its folder in between
            fix = "free space, or set data.cache to another disk" if error.errno == errno.ENOSPC else "check the path"
            raise DataError(f"{error.filename or folder}: cannot prepare data: {error.strerror}; {fix}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _still_right(config: DataConfig, earlier: Path) -> bool:
    """Whether a folder of revision 1 is what this one would make.

    It left long lines out of a tokenizer's training, cut texts where a tokenizer.json says so, named compressed files
    bad documents, and could leave copies of the only held-out document in the training part.
    """
    if config.tokenizer.path is None or config.on_bad_document != "error":
        return False
    meta = read_meta(earlier / "validation")
    return meta.documents > 1 and meta.tokenizer_hash == load_tokenizer(config.tokenizer.path).hash


def cache_key(config: DataConfig, revision: int = REVISION) -> str:
    """Return the name of the folder that holds a configuration's prepared data."""
    made_from: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "sources": [source.model_dump(exclude={"weight"}) for source in config.sources],
        "files": [_stamps(source_files(source)) for source in config.sources],
        "tokenizer": config.tokenizer.model_dump(),
        "tokenizer_files": _stamps(_tokenizer_files(config)),
        "split": [config.seed, config.validation_fraction],
        "on_bad_document": config.on_bad_document,
        "shard_tokens": config.shard_tokens,
    }
    if revision > 1:
        made_from["revision"] = revision
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _tokenizer_files(config: DataConfig) -> list[Path]:
    if config.tokenizer.path is None:
        return []
    path = Path(config.tokenizer.path).expanduser()
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []


class _BadDocuments:
    """What to do with a malformed document: `error` raises, `skip` logs and counts it."""

    def __init__(self, on_bad_document: str) -> None:
        self.raises = on_bad_document == "error"
        self.skipped: set[str] = set()

    def reject(self, message: str) -> None:
        if self.raises:
            raise DataError(f"{message}; mend it, or set data.on_bad_document: skip")
        if message not in self.skipped:  # the sources are read twice: for the tokenizer, then for the shards
            self.skipped.add(message)
            logger.warning("skipped %s", message)


def _write(config: DataConfig, folder: Path) -> None:
    """Make the tokenizer and tokenize both splits into `folder`."""
    bad = _BadDocuments(config.on_bad_document)
    for source in config.sources:
        if message := passed_over(source):
            logger.warning("%s", message)
    tokenizer = _tokenizer(config, folder / "tokenizer", bad)
    sources = [describe(source) for source in config.sources]
    writers = {
        split: ShardWriter(folder / split, tokenizer, sources, config.shard_tokens) for split in ("train", "validation")
    }
    threads = config.workers or os.cpu_count() or 1
    started = logged = time.monotonic()
    for batch in _batches(_documents(config, bad)):
        for document, ids in zip(batch, tokenizer.encode_batch([item.text for item in batch], threads), strict=True):
            writers[document.split].add(ids, document.source, len(document.text.encode("utf-8")))
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            _log_progress("tokenized", list(writers.values()), bad, logged - started)
    for writer in writers.values():
        writer.close()
    _log_progress("prepared", list(writers.values()), bad, time.monotonic() - started)


def _log_progress(verb: str, writers: list[ShardWriter], bad: _BadDocuments, seconds: float) -> None:
    documents, tokens, text_bytes = (
        sum(getattr(writer, counter) for writer in writers) for counter in ("documents", "tokens", "text_bytes")
    )
    logger.info(
        "%s %d documents, %d tokens, %.2f bytes per token, %d skipped, %.0f s",
        verb,
        documents,
        tokens,
        text_bytes / tokens,
        len(bad.skipped),
        seconds,
    )


def _documents(config: DataConfig, bad: _BadDocuments) -> Iterator[SplitDocument]:
    """Read all sources in order. No document at all is an error."""
    texts = (
        (document.text, number)
        for number, source in enumerate(config.sources)
        for document in read_documents(source, bad.reject)
    )
    documents = split_documents(texts, config.seed, config.validation_fraction)
    first = next(documents, None)
    if first is None:
        sources = ", ".join(describe(source) for source in config.sources)
        raise DataError(f"data.sources: no text in {sources}; expected at least one document that is not empty")
    return chain([first], documents)


def _tokenizer(config: DataConfig, folder: Path, bad: _BadDocuments) -> Tokenizer:
    """Load the configured tokenizer, or train one on the training documents, and save it in `folder`."""
    if config.tokenizer.path is None:
        texts = (document.text for document in _documents(config, bad) if document.split == "train")
        return train_tokenizer(texts, config.tokenizer, folder / "tokenizer.model")
    tokenizer = load_tokenizer(config.tokenizer.path)
    tokenizer.check_exportable()
    if lost := lost_by(tokenizer):
        logger.warning(
            "%s: the tokenizer changes text, the model never sees these as they are: %s",
            config.tokenizer.path,
            ", ".join(lost),
        )
    tokenizer.save(folder)
    return tokenizer


def _batches(documents: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    """Group documents into lists of about `BATCH_CHARACTERS`."""
    batch: list[SplitDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
