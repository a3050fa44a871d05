import keyword
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dash_train.data.config import DataConfig, SourceConfig, TokenizerConfig
from dash_train.data.sources import read_documents
from dash_train.data.tokenizer import Tokenizer, train_tokenizer

WORDS = [*keyword.kwlist, *(name for name in dir(str) if name.isalpha())]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted about checked files goes into the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    """Every 60th file of the standard library: about 30 documents, 0.5 MB."""
    return [document.text for document in read_documents(SourceConfig(), reject=print)][::60]


@pytest.fixture(scope="session")
def tokenizer(stdlib_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(stdlib_texts, TokenizerConfig(vocab_size=1024), path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 40 text files of 5 to 800 words, all different."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        words = [WORDS[(number * 7 + place * number) % len(WORDS)] for place in range(5 + number**2 // 2)]
        (folder / f"{number:02d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def data_config(corpus: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    """Builds a configuration that reads `corpus` with a vocabulary of 300."""

    def build(**changes: Any) -> DataConfig:
        options: dict[str, Any] = {
            "sources": [{"type": "text", "path": str(corpus)}],
            "tokenizer": {"vocab_size": 300},
            "cache": str(tmp_path / "cache"),
            "validation_fraction": 0.2,
        }
        return DataConfig(**{**options, **changes})

    return build
