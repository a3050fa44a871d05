"""Writes the JSON schema by which editors complete and check recipes: `python -m dash_train.recipe.editor SCHEMA`.

A recipe's first line names it: `# yaml-language-server: $schema=../docs/recipe.schema.json`.
"""

import json
import sys
from pathlib import Path

from dash_train.recipe.schema import Recipe


def recipe_json_schema() -> str:
    """docs/recipe.schema.json. Keys, types and bounds; rules between keys are checked when a recipe is read."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_json_schema())
