"""The `data` section of a recipe: which text, which tokenizer, how it is cut into rows."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A recipe section: unknown keys are refused, and values are checked again when they change."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


PathText = Annotated[str, Field(min_length=1)]  # an empty one would mean the working folder


class SourceConfig(Section):
    type: Literal["stdlib", "text", "jsonl", "csv", "parquet", "huggingface"] = "stdlib"
    """`stdlib` (the running Python's standard library source), local files, or a Hugging Face dataset."""
    path: PathText | None = None
    """A file, a folder or a glob (`text`: one document per file; `jsonl`, `csv`, `parquet`: one per row), or a dataset:
    its name, or a folder that `save_to_disk` wrote."""
    name: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "text"
    """Column that holds the text (`jsonl`, `csv`, `parquet`, `huggingface`); `data.text` is a field of a field."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Passes over this source in one epoch: 0.5 reads a fresh half of its documents, 2 reads each twice."""


class TokenizerConfig(Section):
    path: PathText | None = None
    """A sentencepiece `.model` file or a Hugging Face folder; null trains a sentencepiece BPE on the sources."""
    vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Vocabulary of a tokenizer that is trained here."""
    training_sentences: Annotated[int, Field(gt=0)] = 200_000
    """Lines of text that training the tokenizer samples."""


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig()]
    """Where the text comes from."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    cache: PathText = ".cache/data"
    """Folder for the trained tokenizer and the token shards, keyed by what they were made from."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents held out for validation."""
    on_bad_document: Literal["error", "skip"] = "error"
    """What a malformed document does: stop with its file and line, or be skipped and counted."""
    shard_tokens: Annotated[int, Field(ge=1024)] = 100_000_000
    """Tokens in one shard file."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads that tokenize; null uses every core."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, of packing and of the order of rows."""
