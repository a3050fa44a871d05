"""The `data` section of a recipe: which text, which tokenizer, how it is cut into rows."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dash_train.recipe.section import PositiveInt, Section

Passes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1)]  # an empty one would mean the working folder
FIELD = re.compile(r"\{([^{}]*)\}")  # in a template
USED_BY = {  # other types of sources have no use for it
    "data_files": ("text", "jsonl", "csv", "parquet", "huggingface"),
    "template": ("jsonl", "csv", "parquet", "huggingface"),
    "streaming": ("huggingface",),
    "supervised": ("jsonl", "huggingface"),
}


class SourceConfig(Section):
    type: Literal["stdlib", "text", "jsonl", "csv", "parquet", "huggingface"] = "stdlib"
    """`stdlib` (the running Python's standard library source), files, or a Hugging Face dataset."""
    path: PathText | None = None
    """A file, a folder or a glob, local or at an address that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`):
    `text` is one document per file; `jsonl`, `csv`, `parquet` one per row. Or a dataset: its name, or a folder that
    `save_to_disk` wrote."""
    data_files: PathText | list[PathText] | None = None
    """Only these files: names or patterns, of files below `path` or of a Hugging Face dataset."""
    name: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "text"
    """Column that holds the text (`jsonl`, `csv`, `parquet`, `huggingface`); `data.text` is a field of a field."""
    template: PathText | None = None
    """Joins several columns to one text, instead of `field`: `"{title}\\n\\n{body}"`."""
    supervised: bool = False
    """Rows are `{"prompt": ..., "response": ...}`, or `{"messages": [{"role": ..., "content": ...}, ...]}` for the
    tokenizer's chat template; only the responses, what the role `assistant` says, count in the loss."""
    streaming: bool = False
    """Read a Hugging Face dataset as it is fetched, without a copy on disk."""
    streams: PositiveInt | None = None
    """Parts that a streamed dataset is read in, one after the other; null: 64, or as many as it has files."""
    documents: PositiveInt | None = None
    """Of a streamed dataset, only so many rows: an equal number from the beginning of each stream."""
    weight: Passes = 1.0
    """Passes over this source in one epoch: 0.5 reads a fresh half of its documents, 2 reads each twice. Or, with
    `data.weight_by`, its share of the documents or tokens, relative to the other sources."""
    max_passes: Passes | None = None
    """Most passes over this source in the whole run; then it gives nothing, and the others all. null: no limit."""
    length_weights: dict[PositiveInt, Passes] = Field(default_factory=dict)
    """How often a pass reads long documents, by the tokens that they hold at least: `{8192: 2, 32768: 4.5}`; those that
    are shorter are read once."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "SourceConfig":
        """Refuse by name what another type of source would silently leave out."""
        for name, types in USED_BY.items():
            if self.type not in types and getattr(self, name):
                raise ValueError(f"{name}: a {self.type} source does not use it ({', '.join(types)})")
        for name in ("streams", "documents"):
            if getattr(self, name) and not self.streaming:
                raise ValueError(f"{name}: only with streaming: true")
        if self.supervised and (self.template is not None or self.field != "text"):
            raise ValueError("supervised: rows have fields of their own; leave field and template out")
        if self.template is not None and not FIELD.search(self.template):
            raise ValueError(f"template: no {{field}} in {self.template!r}")
        return self


class StageConfig(Section):
    from_step: PositiveInt
    """First step of the stage, counted from 1."""
    weights: Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]
    """Weights of the sources from that step on, in their order; 0 leaves one out."""


class TokenizerConfig(Section):
    path: PathText | None = None
    """A sentencepiece `.model` file or a Hugging Face folder; null trains a sentencepiece BPE on the sources."""
    vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Vocabulary of a tokenizer that is trained here."""
    training_sentences: PositiveInt = 200_000
    """Lines of text that training the tokenizer samples."""


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig()]  # noqa: RUF012
    """Where the text comes from."""
    weight_by: Literal["passes", "documents", "tokens"] = "passes"
    """What the weights of the sources count: passes over each in an epoch, in rows that mix documents of all sources;
    or shares of the `documents` or `tokens` that are trained on, in rows of one source each."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Other weights from some steps on; with `weight_by: documents` or `tokens`."""
    validation: list[SourceConfig] = Field(default_factory=list)
    """Documents to validate on; an empty list holds out a share of the sources. Documents of the sources that are also
    here are left out of the training."""
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
    workers: PositiveInt | None = None
    """Threads that tokenize; null uses every core."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, of packing and of the order of rows."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.stages and self.weight_by == "passes":
            raise ValueError("stages: they need weight_by: documents or tokens")
        for number, source in enumerate(self.validation):
            if source.weight != 1 or source.max_passes or source.length_weights:
                raise ValueError(f"validation.{number}: no weights or passes; what is validated on is read once")
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.sources):
                raise ValueError(f"stages.{number}.weights: {len(stage.weights)} for {len(self.sources)} sources")
            if not any(stage.weights):
                raise ValueError(f"stages.{number}.weights: all are 0")
            if number and stage.from_step <= self.stages[number - 1].from_step:
                raise ValueError(f"stages.{number}.from_step: {stage.from_step} does not follow the stage before")
        return self
