"""Write the files of recipes/mixture.yaml: five small corpora in five formats, from what every Python brings along.

python recipes/mixture.py [FOLDER, default .cache/mixture]
"""

import ast
import calendar
import csv
import gzip
import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from dash_train.data.config import SourceConfig
from dash_train.data.sources import read_documents

STREAMED_FILES = 4


def main(folder: Path) -> None:
    """Write what is not there yet."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "done").exists():
        return
    with gzip.open(folder / "topics.jsonl.gz", "wt", encoding="utf-8") as file:
        for name in sorted(topics):
            file.write(json.dumps({"meta": {"name": name}, "data": {"text": topics[name]}}) + "\n")
    parquet.write_table(pyarrow.table({"content": list(docstrings())}), folder / "docstrings.parquet")
    with (folder / "characters.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["title", "body"])
        table.writerows(characters())
    Dataset.from_dict({"text": list(sums())}).save_to_disk(folder / "sums")
    (folder / "calendars").mkdir(exist_ok=True)
    for number in range(STREAMED_FILES):
        years = range(1800 + number * 100, 1900 + number * 100)
        lines = [json.dumps({"text": calendar.TextCalendar().formatyear(year)}) + "\n" for year in years]
        (folder / "calendars" / f"part-{number}.jsonl").write_text("".join(lines))
    (folder / "done").touch()


def docstrings() -> Iterator[str]:
    """The docstrings of the standard library's modules, each with those of its functions and classes."""
    for document in read_documents(SourceConfig(), reject=print):
        try:
            nodes = ast.walk(ast.parse(document.text))
        except (SyntaxError, ValueError):  # some are tests of the parser
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        if found:
            yield "\n\n".join(found)


def characters() -> Iterator[tuple[str, str]]:
    """The names of 128 characters at a time."""
    for first in range(0, 0x3000, 128):
        names = [f"{code:04X} {unicodedata.name(chr(code), '')}" for code in range(first, first + 128)]
        yield f"Characters from U+{first:04X}", "\n".join(name for name in names if len(name) > 5)


def sums() -> Iterator[str]:
    """Pages of sums, the same ones every time."""
    generator = random.Random(0)
    for _ in range(500):
        pairs = [(generator.randrange(1000), generator.randrange(1000)) for _ in range(40)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/mixture"))
