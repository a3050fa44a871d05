"""Trained models as commands take them: a run folder, one of its checkpoints, or an exported folder."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from dash_train.data.tokenizer import Tokenizer, load_tokenizer
from dash_train.model.transformer import LanguageModel
from dash_train.training import checkpoint
from dash_train.training.initial import open_source


@dataclass(frozen=True)
class Trained:
    """A model, ready to use on the GPU in bf16 or on the CPU in fp32, and what belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    seq: int
    """Tokens of the longest context that it was trained on."""
    run_dir: Path | None
    """The folder of the run, None for an export."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end a text, beside the tokenizer's own."""

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype


def load_trained(path: str | Path) -> Trained:
    """Load a run's newest checkpoint, a certain checkpoint, an export, or any Llama or Qwen3 folder.

    Raises:
        UserError: it is none of these.
    """
    from dash_train.huggingface.conversion import (  # transformers' formats, which take a while to import
        assemble,
        read_eos_ids,
    )
    from dash_train.huggingface.export import read_max_seq

    path = Path(path)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    source = open_source(path, named_by="")
    if source.checkpoint is None:
        seq, run_dir = read_max_seq(path), None
    else:
        seq, run_dir = checkpoint.load_state(source.checkpoint).recipe["train"]["seq"], source.tokenizer.parent
    ends = frozenset(read_eos_ids(source.tokenizer))
    with redirect_stdout(sys.stderr):  # DeepSpeed tells there how it gathers shards
        weights = source.load()
    model = assemble(source.config, weights, dtype, device, path)
    return Trained(model, load_tokenizer(source.tokenizer), seq, run_dir, ends)
