"""Reads a recipe: YAML, overrides, checks, and one line for what is wrong with it."""

import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dash_train.data.config import SourceConfig, TokenizerConfig
from dash_train.errors import UserError
from dash_train.recipe.schema import Recipe
from dash_train.recipe.section import flatten_annotation, is_section
from dash_train.recipe.stages import stage_recipe

MOST_BYTES, MOST_KEYS = 1 << 20, 10_000  # a recipe has a few hundred; more is another file, or aliases that multiply
LARGEST_FLOAT, LARGEST_INT = 1e30, 2**63 - 1  # what float32 and 64 bits hold with room to compute


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` strings; values are YAML, list items are addressed by number (`data.sources.0.path`).

    Raises:
        UserError: one line with file, line, key, what was expected and the nearest right name of an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; recipes/ holds examples")
    values, lines = _parse(_read(path), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `section: ...` keys, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, path, lines, overrides)) from error
    except RecursionError as error:
        raise UserError(f"{path}: values that are nested too deeply") from error
    _check_numbers(recipe.model_dump(by_alias=True), path, lines)
    for number in range(len(recipe.stages)):
        try:
            stage_recipe(recipe, number)
        except ValidationError as error:
            raise UserError(_describe(error, Path(f"{path}: stages.{number}"), {})) from error
    _resolve_paths(recipe)
    return recipe


def _resolve_paths(recipe: Recipe) -> None:
    """Make relative paths absolute, so that a run and its later commands mean the same wherever they are started."""
    recipe.run_dir = os.path.abspath(recipe.run_dir)
    if recipe.init.from_ is not None:
        recipe.init.from_ = os.path.abspath(recipe.init.from_)
    data = recipe.data
    data.cache = os.path.abspath(os.path.expanduser(data.cache))
    sections: list[SourceConfig | TokenizerConfig] = [*data.sources, *data.validation, data.tokenizer]
    for section in sections:
        path = section.path
        is_name = isinstance(section, SourceConfig) and section.type == "huggingface"
        if path is None or "://" in path or (is_name and not os.path.exists(os.path.expanduser(path))):
            continue
        section.path = os.path.abspath(os.path.expanduser(path))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example train.steps=100")
    node: Any = values
    parts: list[Any] = [int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split(".")]
    shown = reprlib.repr(override)
    try:
        value, _ = _parse(text, f"override {shown}")
    except UserError as error:
        quoted = f"; text with such signs needs quotes of its own: {key}=\"'{text}'\"" if len(text) < 80 else ""
        raise UserError(f"{error}{quoted}") from error
    try:
        for part, following in pairwise(parts):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = [] if isinstance(following, int) else {}
            elif isinstance(node, list) and part == len(node):
                node.append({})
            node = node[part]
        if isinstance(node, list) and parts[-1] == len(node):
            node.append(None)
        node[parts[-1]] = value
    except (TypeError, IndexError, KeyError) as error:
        raise UserError(f"override {shown}: {key[:80]} names nothing in this recipe") from error


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES >> 20} MiB; is this a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parse(text: str, origin: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The values of a YAML text, and the line of every key."""
    try:
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader), origin)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark and not origin.startswith("override") else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{origin}{where}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: not a recipe: its values nest too deeply, or hold themselves") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # a date, number or truth value that is none
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _check_numbers(values: Any, path: Path, lines: dict[tuple[Any, ...], int], prefix: tuple[Any, ...] = ()) -> None:
    """Refuse what no run can compute with: infinities, and numbers that overflow on the way."""
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    for key, value in values.items() if isinstance(values, dict) else ():
        name = (*prefix, key)
        _check_numbers(value, path, lines, name)
        too_large = isinstance(value, float) and not abs(value) <= LARGEST_FLOAT
        if too_large or (isinstance(value, int) and abs(value) > LARGEST_INT):
            where = f"{path}:{lines[name]}" if name in lines else str(path)
            most = f"{LARGEST_FLOAT:g}" if isinstance(value, float) else "64 bits"
            raise UserError(f"{where}: {_dotted(name)}: expected a finite number of at most {most}, found {value}")


def _key_lines(node: Any, path: str, prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """The line of every key, for messages; a key that stands twice is refused, since YAML would drop the first."""
    lines: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise UserError(f"{path}:{line}: a key must be plain text; was a {{{{ template }}}} left in?")
            name = (*prefix, key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{path}:{line}: {_dotted(name)} is set twice (first in line {lines[name]})")
            lines[name] = line
            lines |= _key_lines(value, path, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*prefix, index)] = value.start_mark.line + 1
            lines |= _key_lines(value, path, (*prefix, index))
    if len(lines) > MOST_KEYS:
        raise UserError(f"{path}: more than {MOST_KEYS} values; is this a recipe, or do its aliases multiply?")
    return lines


def _describe(
    error: ValidationError, path: Path, lines: dict[tuple[Any, ...], int], overrides: Sequence[str] = ()
) -> str:
    """One line for the first key that is wrong (a value that fits no type of a union has one error per type)."""
    errors = error.errors()
    location, section = _locate(errors[0]["loc"])
    same_key = [e for e in errors if _locate(e["loc"])[0] == location]
    others = len({_locate(e["loc"])[0] for e in errors}) - 1
    where = f"{path}:{lines[location]}" if location in lines else str(path)
    key = f"{_dotted(location)}: " if location else ""
    dotted = f"{_dotted(location)}."
    given = [override for override in overrides if _share_a_beginning(f"{override.partition('=')[0]}.", dotted)]
    if location and given:  # it replaced what the file says
        where = f"override {reprlib.repr(given[-1])}"
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        message = "unknown key" + _nearest(location, section)
    elif kind == "missing":
        message = "is required"
    elif kind == "value_error":
        message = str(errors[0]["ctx"]["error"])
    else:
        expected = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input ") for e in same_key))
        message = f"{expected}, found {reprlib.repr(errors[0]['input'])}"
    return f"{where}: {key}{message}" + (f" (and {others} more)" if others else "")


def _share_a_beginning(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _locate(loc: tuple[int | str, ...]) -> tuple[tuple[Any, ...], type[BaseModel] | None]:
    """The recipe key of a pydantic location (which also names union branches), and the section it stands in."""
    section: type[BaseModel] | None = Recipe
    node: Any = Recipe
    key: list[Any] = []
    for part in loc:
        if isinstance(part, int):
            key.append(part)
        elif node is not None:
            section = node
            key.append(part)
            node = None
            field = next((f for n, f in section.model_fields.items() if (f.alias or n) == part), None)
            if field is not None:
                node = next((t for t in flatten_annotation(field.annotation) if is_section(t)), None)
    return tuple(key), section


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    keys = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        keys.append(key)
        for inner in filter(is_section, flatten_annotation(field.annotation)):
            keys += recipe_keys(inner, f"{key}.")
    return keys


def _nearest(location: tuple[Any, ...], section: type[BaseModel] | None) -> str:
    *parents, name = [str(part) for part in location]
    siblings = [field.alias or n for n, field in section.model_fields.items()] if section else []
    # By their last part; of several keys the shortest.
    elsewhere = {key.rpartition(".")[2]: key for key in sorted(recipe_keys(), key=len, reverse=True)}
    if name in elsewhere:
        return f"; did you mean {elsewhere[name]}?"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {'.'.join([*parents, close[0]])}?"
    if close := difflib.get_close_matches(name, list(elsewhere), n=1):
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; here stand {', '.join(siblings)}"


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location)
