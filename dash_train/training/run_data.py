"""The prepared text of a run: what it had before, wherever its sources have gone since, else what its recipe names."""

import logging
from dataclasses import dataclass
from pathlib import Path

from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.integrity import check_contents
from dash_train.data.prepare import prepare
from dash_train.data.shards import read_meta
from dash_train.data.tokenizer import Tokenizer, load_tokenizer
from dash_train.distributed.world import World, from_main
from dash_train.errors import UserError
from dash_train.training import checkpoint
from dash_train.training.checkpoint import TrainState
from dash_train.training.initial import tokenizer_of
from dash_train.training.start import Start

NO_MATTER = {"workers"}  # for what the text becomes, and where

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """Text that is ready to be read."""

    config: DataConfig
    """The recipe's section, with the tokenizer that was settled on."""
    folder: Path
    tokenizer: Tokenizer


def open_data(start: Start, world: World) -> RunData:
    """The text of a run, tokenized by the main rank where it is not yet, while the others wait.

    A run that goes on, and one that starts from another with the same `data` section, takes the folder of before, and
    looks at no source. A tokenizer is trained for a run that starts from nothing alone.
    """
    config = start.recipe.data
    folder = from_main(world, lambda: folder_of(start.state, config))
    if folder is None:
        config = _with_tokenizer(config, start)
        folder = from_main(world, lambda: folder_of(start.state, config)) or _prepare(config, world)
    return RunData(config, folder, load_tokenizer(folder / "tokenizer"))


def data_of(found: Path) -> Path:
    """The folder of the text that the run of a checkpoint was trained on; where it is gone, the run's sources, if they
    are there, tokenized by the run's own tokenizer.

    Raises:
        UserError: the text does not fit the tokenizer.
        DataError: a source is gone.
    """
    state, tokenizer = checkpoint.load_state(found), tokenizer_of(found)
    config = DataConfig.model_validate(state.recipe["data"])
    folder = folder_of(state, config)
    if folder is None:
        path = config.tokenizer.model_copy(update={"path": str(tokenizer.absolute())})
        folder = prepare(config.model_copy(update={"tokenizer": path}))
        logger.warning(
            "%s: the text that this run was trained on is gone from %s; its sources, as they are now, were tokenized "
            "again by the run's tokenizer",
            found,
            state.data or config.cache,
        )
    if read_meta(folder / "validation").tokenizer_hash != load_tokenizer(tokenizer).hash:
        raise UserError(f"{folder}: was made by another tokenizer than {tokenizer}; delete the folder")
    return folder


def folder_of(state: TrainState | None, config: DataConfig) -> Path | None:
    """The folder that a run had, where the section is still what it was, and the folder is there and sound."""
    if state is None or state.data is None:
        return None
    before = DataConfig.model_validate(state.recipe["data"])
    if before.model_dump(exclude=NO_MATTER) != config.model_dump(exclude=NO_MATTER):
        return None
    folder = Path(state.data)
    try:
        check_contents(folder)
    except DataError as error:
        logger.warning("%s; prepared again", error)
        return None
    return folder


def _with_tokenizer(config: DataConfig, start: Start) -> DataConfig:
    """The section with the tokenizer of the weights that the run starts from, unless the recipe names another."""
    if config.tokenizer.path is not None or (start.source is None and start.checkpoint is None):
        return config
    # The same path as before, where it still exists, is the same text, tokenized already.
    before = start.state.recipe["data"]["tokenizer"]["path"] if start.state else None
    own = start.source.tokenizer if start.source else tokenizer_of(start.checkpoint)  # type: ignore[arg-type]
    path = before if before and Path(before).exists() else str(own.absolute())
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": path})})


def _prepare(config: DataConfig, world: World) -> Path:
    from_main(world, lambda: prepare(config))
    return prepare(config)
