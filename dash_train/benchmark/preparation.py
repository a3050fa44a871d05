"""How much longer preparing a corpus takes than its tokenization alone, on one core.

Times are of the process, so that other work on the machine does not count.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from dash_train.data.config import DataConfig
from dash_train.data.prepare import prepare
from dash_train.data.sources import read_documents
from dash_train.data.tokenizer import load_tokenizer
from dash_train.recipe.load import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch/benchmark.py prepare`."""
    parser.add_argument("recipe", type=Path, help="its data section is prepared, in a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the recipe's")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare once for the tokenizer, then tokenize the texts alone, then prepare with that tokenizer."""
    config = load_recipe(args.recipe, args.overrides).data
    with tempfile.TemporaryDirectory() as folder:
        trained = prepare(config.model_copy(update={"cache": f"{folder}/first", "workers": 1})) / "tokenizer"
        tokenizer = load_tokenizer(trained)
        texts = [d.text for source in config.sources for d in read_documents(source, lambda _: None)]
        began = time.process_time()
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        alone = time.process_time() - began
        again = {**config.model_dump(), "cache": f"{folder}/second", "workers": 1, "tokenizer": {"path": str(trained)}}
        began = time.process_time()
        prepare(DataConfig(**again))
        whole = time.process_time() - began
    return {
        "documents": len(texts),
        "tokens": tokens,
        "text_mb": sum(len(text.encode("utf-8")) for text in texts) / 1e6,
        "tokenization_seconds": alone,
        "preparation_seconds": whole,
        "ratio": whole / alone,
    }
