"""The rows of a prepared corpus as a recipe's data section wants them: of one pool of documents, or a mixture."""

from pathlib import Path

import numpy as np

from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.loader import RowDataset
from dash_train.data.mixture import Mixture
from dash_train.data.shards import TokenShards


def training_rows(
    config: DataConfig, folder: Path, *, seq: int, chunk_size: int, global_batch_size: int
) -> RowDataset | Mixture:
    """Open the rows that a run trains on. `global_batch_size` says which row a step of `data.stages` begins at."""
    sources = config.sources
    max_passes = [source.max_passes for source in sources]
    length_weights = [source.length_weights for source in sources]
    shards = TokenShards(folder / "train")

    def rows(weights: list[float]) -> RowDataset:
        return RowDataset(
            folder,
            "train",
            seq=seq,
            chunk_size=chunk_size,
            weights=weights,
            max_passes=max_passes,
            length_weights=length_weights,
            seed=config.seed,
            shards=shards,
        )

    weights = [source.weight for source in sources]
    if config.weight_by == "passes":
        return rows(weights)
    for number, documents in enumerate(np.diff(shards.source_starts)):
        if not documents:
            raise DataError(f"data.sources.{number}: holds no document to train on; leave it out or give it more")
    stages = [(0, weights)]
    for stage in config.stages:
        first = (stage.from_step - 1) * global_batch_size
        stages = [(begin, given) for begin, given in stages if begin < first] + [(first, stage.weights)]
    alone = [rows([float(other == number) for other in range(len(sources))]) for number in range(len(sources))]
    return Mixture(alone, stages, config.weight_by)


def validation_rows(folder: Path, *, seq: int, chunk_size: int, seed: int) -> RowDataset:
    """Open the rows that a run validates on."""
    return RowDataset(folder, "validation", seq=seq, chunk_size=chunk_size, seed=seed)


def by_source(rows: RowDataset) -> dict[str, RowDataset]:
    """Return the rows of each source alone, by its name; those that hold no document are left out."""
    names = rows.shards.meta.sources
    held = np.diff(rows.shards.source_starts)
    return {
        name: RowDataset(
            rows.shards.folder.parent,
            rows.shards.folder.name,
            seq=rows.seq,
            chunk_size=rows.chunk_size,
            weights=[float(other == number) for other in range(len(names))],
            seed=rows.seed,
            shards=rows.shards,
        )
        for number, name in enumerate(unique_names(names))
        if held[number]
    }


def unique_names(names: list[str]) -> list[str]:
    """Return names of which none is twice: the second `a` is `a (2)`."""
    return [
        name if names[:number].count(name) == 0 else f"{name} ({names[:number].count(name) + 1})"
        for number, name in enumerate(names)
    ]
