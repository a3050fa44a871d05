"""Editors are told what the recipe's classes say."""

import json
from typing import Any

import pytest
import yaml
from tiny_runs import ROOT

from dash_train.recipe.editor import recipe_json_schema

PATH = ROOT / "docs/recipe.schema.json"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_schema_is_current():
    assert PATH.read_text() == recipe_json_schema(), "run `make docs`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_the_schema_and_have_its_keys(recipe):
    first = recipe.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (recipe.parent / first.partition("=")[2]).resolve() == PATH.resolve()
    schema = json.loads(PATH.read_text())
    _check_keys(yaml.safe_load(recipe.read_text()), schema, schema["$defs"])


def _check_keys(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Each mapping's keys are those of a section that the schema allows in its place."""
    options = [option for each in schema.get("anyOf", [schema]) for option in each.get("oneOf", [each])]
    if schema.get("additionalProperties"):  # DeepSpeed's own keys, or numbers
        return
    if isinstance(value, dict):
        sections = [definitions[each["$ref"].split("/")[-1]] if "$ref" in each else each for each in options]
        section = next(each for each in sections if value.keys() <= each.get("properties", {}).keys())
        assert section["additionalProperties"] is False
        for key, inner in value.items():
            _check_keys(inner, section["properties"][key], definitions)
    elif isinstance(value, list):
        items = next(each["items"] for each in options if "items" in each)
        for inner in value:
            _check_keys(inner, items, definitions)
