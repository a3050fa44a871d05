"""How fast rows are read, how long a rank takes to start and how much memory it holds, on a simulated corpus.

The corpus has the index of a real one, and token files that are empty to the disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dash_train.data.packing import Ints
from dash_train.data.shards import FORMAT_VERSION, INDEX, META, SCAN, ShardFile, ShardsMeta

SPREAD = 1.2  # standard deviation of the logarithm of a document's tokens, about that of web pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py load`."""
    parser.add_argument(
        "--documents", type=int, default=10_000_000, help="documents of the corpus (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=float, default=600.0, help="mean tokens of a document (default: %(default)s)")
    parser.add_argument("--sources", type=int, default=4, help="sources of the corpus (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=32768, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2000, help="rows that are read (default: %(default)s)")
    parser.add_argument(
        "--index", type=int, default=0, help="row to begin with, as a run that is resumed there (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the corpus is simulated, and kept (default: a temporary one)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate the corpus where it is not there yet, and start on it twice, each in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "train" / META).exists():
            simulate(folder / "train", args.documents, args.tokens, args.sources)
        command = [sys.executable, "-m", "dash_train.benchmark.load", str(folder)]
        command += [str(value) for value in (args.seq, args.chunk_size, args.rows, args.index)]
        first, second = (json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in "12")
    return {"first_start_seconds": first["start_seconds"], **second}


def simulate(folder: Path, documents: int, tokens: float, sources: int) -> None:
    """Write the index of a split of so many documents, drawn from a lognormal distribution, and empty token files."""
    generator = np.random.default_rng(0)

    def lengths(count: int) -> Ints:
        drawn = generator.lognormal(np.log(tokens) - SPREAD**2 / 2, SPREAD, count)
        return drawn.astype(np.int64) + 2

    write_split(folder, documents, lengths, lambda some: some * sources // documents)


def write_split(folder: Path, documents: int, lengths: Callable[[int], Ints], source: Callable[[Ints], Ints]) -> None:
    """Write a split whose tokens are all 0: `lengths(count)` gives those of the next documents, `source` theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFile] = []
    named = 0
    with (folder / INDEX).open("wb") as index:
        for first in range(0, documents, SCAN):
            some = np.arange(first, min(first + SCAN, documents))
            drawn = lengths(len(some))
            index.write(np.stack([drawn, source(some)], axis=1).astype(np.int64).tobytes())
            named = max(named, int(source(some)[-1]) + 1)
            name, total = f"tokens-{len(shards):05d}.bin", int(drawn.sum())
            with (folder / name).open("wb") as shard:
                shard.truncate(2 * total)
            shards.append(ShardFile(name, 2 * total, f"simulated {total}", total))
    meta = ShardsMeta(
        format_version=FORMAT_VERSION,
        dtype="uint16",
        vocab_size=2**16,
        pad_id=0,
        tokenizer_hash="simulated",
        sources=[f"source {number}" for number in range(named)],
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=0,
        index=ShardFile(INDEX, 16 * documents, f"simulated {documents}"),
        shards=shards,
    )
    (folder / META).write_text(json.dumps(asdict(meta)))


def _start(folder: str, seq: int, chunk_size: int, rows: int, index: int) -> dict[str, Any]:
    """Open the corpus as one rank does, and read rows."""
    from dash_train.data.loader import RowDataset

    imports = _peak_mb()
    began = time.perf_counter()
    dataset = RowDataset(folder, "train", seq=seq, chunk_size=chunk_size)
    dataset.row(index)
    start = time.perf_counter() - began
    began = time.perf_counter()
    for number in range(rows):
        dataset.row(index + number)
    seconds = time.perf_counter() - began
    return {
        "documents": dataset.shards.meta.documents,
        "rows_of_an_epoch": dataset.rows(0),
        "fill": dataset.fill(),
        "start_seconds": start,
        "million_tokens_a_second": rows * seq / seconds / 1e6,
        "peak_memory_mb": _peak_mb(),
        "of_which_imports_mb": imports,
    }


def _peak_mb() -> float:
    """Peak resident memory. (What getrusage tells is at least that of the process that started this one.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(_start(sys.argv[1], *map(int, sys.argv[2:]))))
