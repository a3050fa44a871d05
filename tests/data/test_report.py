"""What `launch/prepare.py` says of a corpus, and its jobs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dash_train.data.config import DataConfig
from dash_train.data.loader import RowDataset
from dash_train.data.prepare import prepare
from dash_train.data.report import hash_documents, length_histogram, write_report
from dash_train.data.shards import TokenShards
from dash_train.launch.prepare import build_parser

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(data_config: Callable[..., DataConfig], corpus: Path) -> Path:
    """Forty documents, and three copies of one of them in files of other names."""
    text = (corpus / "10.txt").read_text()
    for number in range(3):
        (corpus / f"copy{number}.txt").write_text(text)
    return prepare(data_config())


def test_copies_are_counted_and_others_are_not(folder: Path) -> None:
    splits = [TokenShards(folder / split) for split in ("train", "validation")]
    hashes = np.concatenate([hash_documents(shards) for shards in splits])
    assert len(hashes) == 43 and len(np.unique(hashes)) == 40


def test_the_histogram_counts_every_document_and_token(folder: Path) -> None:
    shards = TokenShards(folder / "train")
    documents, tokens = length_histogram(shards)
    assert (documents.sum(), tokens.sum()) == (shards.meta.documents, shards.meta.tokens)
    for number, count in enumerate(documents):
        assert count == ((shards.lengths >= 2**number) & (shards.lengths < 2 ** (number + 1))).sum()


def test_the_report_says_what_there_is(folder: Path) -> None:
    datasets = {split: RowDataset(folder, split, seq=128, chunk_size=16) for split in ("train", "validation")}
    text = write_report(folder, datasets)
    train, validation = (dataset.shards.meta for dataset in datasets.values())
    assert f"train: {train.documents} documents, {train.tokens:,} tokens" in text
    copies = {
        f"exact duplicates in {split}: 3 of {m.documents} documents"
        for split, m in (("train", train), ("validation", validation))
    }
    assert sum(line in text for line in copies) == 1
    assert "documents of train that are also in validation: 0" in text
    assert text.count("tokens:\n  | ") == 6
    assert (folder / "report.txt").read_text() == text + "\n"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_does_parts_and_reports(corpus: Path, tmp_path: Path) -> None:
    source = [f"data.sources=[{{type: text, path: {corpus}}}]", "data.tokenizer.vocab_size=300"]

    def run(*options: str, cache: str = "parts") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "launch" / "prepare.py", ROOT / "recipes" / "quickstart.yaml", *source]
        return subprocess.run([*command, f"data.cache={tmp_path / cache}", *options], capture_output=True, text=True)

    first = run("--part", "2/2")
    assert first.stdout == "part 2 of 2 is done; the job that ends last puts the parts together\n"
    second = run("--part", "1/2", "--report")
    assert second.returncode == 0 and "exact duplicates in train: 0 of" in second.stdout
    folder = Path(second.stdout.splitlines()[-1])
    assert (folder / "report.png").exists()
    alone = Path(run(cache="alone").stdout.splitlines()[-1])
    for file in alone.rglob("*.*"):
        assert (folder / file.relative_to(alone)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("wrong", ["3/2", "0/2", "x", "1/0"])
def test_a_part_that_is_none_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["recipe.yaml", "--part", wrong])
    assert f"expected K/N with K from 1 to N, as 3/16, found '{wrong}'" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """A text that is held whole would take 16 bytes a document, what was packed at once some 140."""
    command = [sys.executable, ROOT / "launch" / "benchmark.py", "load", "--documents", "2000000", "--rows", "5"]
    done = subprocess.run([*command, "--json", tmp_path / "load.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["documents"] == 2_000_000
    assert found["peak_memory_mb"] - found["of_which_imports_mb"] < 80
