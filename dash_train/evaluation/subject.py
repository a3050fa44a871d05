"""What is evaluated: a trained model, a way to decode, and text it has not seen."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_train.data import sources
from dash_train.data.config import SourceConfig
from dash_train.data.shards import TokenShards
from dash_train.data.tokenizer import Tokenizer
from dash_train.errors import UserError
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.trained import Trained
from dash_train.model.cache import Cache, Decoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """All that a task needs."""

    trained: Trained
    decoding: Decoding
    piece_size: int
    documents: list[list[int]]
    """Token ids, from <bos> to <eos>; the longest first."""
    seed: int

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""
        return Cache.allocate(
            self.trained.model.config,
            batch,
            capacity,
            self.trained.dtype,
            self.trained.device,
            decoding=self.decoding,
            piece_size=self.piece_size,
            requests=[self.seed * 2**20 + row for row in range(batch)],
        )

    def describe(self) -> dict[str, Any]:
        """How results were made, for JSON."""
        decoding = asdict(self.decoding)
        mode, routing_every = decoding.pop("mode"), decoding.pop("routing_every")
        sampling = decoding if mode == "vattention" else {}
        return {"decode": mode, "routing_every": routing_every, **sampling, "seed": self.seed}


def read_documents(trained: Trained, text: Path | None) -> list[list[int]]:
    """The documents of a file or of all files of a folder, or else the run's own validation documents.

    Raises:
        UserError: there are none.
    """
    if text is not None:
        documents = _text_documents(trained.tokenizer, text)
    elif trained.run_dir is not None:
        documents = _validation_documents(trained.run_dir)
    else:
        raise UserError("--text: an exported model comes without documents; give a text file, a folder, or its run")
    if not documents:
        raise UserError(f"{text or trained.run_dir}: holds no document to evaluate on")
    return sorted(documents, key=len, reverse=True)


def _text_documents(tokenizer: Tokenizer, path: Path) -> list[list[int]]:
    def reject(message: str) -> None:
        raise UserError(f"--text: {message}; mend it, or leave it out")

    if not path.exists():
        raise UserError(f"--text: {path}: no such file or folder")
    source = SourceConfig(type="text", path=str(path))
    if message := sources.passed_over(source):
        logger.warning("--text: %s", message)
    texts = [document.text for document in sources.read_documents(source, reject)]  # as training reads them
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def _validation_documents(run_dir: Path) -> list[list[int]]:
    from dash_train.training.checkpoint import find
    from dash_train.training.run_data import data_of

    shards = TokenShards(data_of(find(run_dir)) / "validation")
    return [shards.tokens(i, 0, int(length)).tolist() for i, length in enumerate(shards.lengths)]


def summary(report: DecodeReport) -> dict[str, float | None]:
    """The part of a report that a result is given with."""
    return {"density": report.density, "half_width": report.half_width, "fallbacks": report.fallbacks}
