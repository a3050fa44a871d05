"""Writes docs/recipe.md from the recipe's classes: `python -m dash_train.recipe.docs docs/recipe.md`."""

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dash_train.recipe.schema import Recipe
from dash_train.recipe.section import flatten_annotation, is_section

HEADER = """# The recipe

A run is one YAML file. Unknown keys are refused; a key left out takes its default. On the command line
`key.sub=value` replaces a value (`train.steps=100`, `data.sources.0.path=corpus/*.jsonl`). The resolved recipe is kept
in the run folder. This page is generated from `dash_train/recipe/schema.py` by `make docs`.
"""


def recipe_markdown() -> str:
    """The page: one table a section, one row a key."""
    plain = {name: field for name, field in Recipe.model_fields.items() if not _sections(field)}
    parts = [HEADER, _table("the top level", "", plain)]
    for name, field in Recipe.model_fields.items():
        for section in _sections(field):
            parts.append(_section(name, field.description or "", section))
    return "\n".join(parts)


def _section(key: str, description: str, section: type[BaseModel]) -> str:
    plain = {name: field for name, field in section.model_fields.items() if not _sections(field)}
    parts = [_table(f"`{key}`", description, plain)]
    for name, field in section.model_fields.items():
        for inner in _sections(field):
            suffix = "[]" if "list" in str(field.annotation) else ""
            parts.append(_section(f"{key}.{field.alias or name}{suffix}", field.description or "", inner))
    return "\n".join(parts)


def _table(title: str, description: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"## {title}", "", *([description, ""] if description else [])]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split())
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        lines.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    return [inner for inner in flatten_annotation(field.annotation) if is_section(inner)]


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in get_args(annotation))
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated: the type, then its bounds
        return _type(arguments[0])
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if arguments:
        return " or ".join(_type(arg) for arg in arguments)
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}.get(annotation.__name__, "")


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_markdown())
