from pathlib import Path

import torch

from dash_train.huggingface.conversion import export
from dash_train.model.transformer import LanguageModel


class NoTokenizer:
    """Stands where a tokenizer is written along; its own export is tested with it."""

    bos_id, eos_id, pad_id = 1, 2, 3

    def save_huggingface(self, folder: Path) -> None:
        pass


def export_folder(model: LanguageModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Exports the model to `folder`/out."""
    out = folder / "out"
    tokenizer = NoTokenizer()
    export(model.state_dict(), model.config, tokenizer, out, max_seq=128, dtype=dtype, card="# A model")  # type: ignore[arg-type]
    return out
