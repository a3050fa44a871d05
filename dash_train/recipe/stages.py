"""The stages of a recipe, each as a recipe of its own."""

import copy

from dash_train.recipe.schema import Recipe
from dash_train.recipe.values import merge


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of every stage, in order; of a recipe without stages, itself.

    `train.steps` of each is the step at which it ends, counted from the beginning of the run; the schedule runs over
    all of them, unless the recipe or the stage says otherwise.

    Raises:
        pydantic.ValidationError: a stage's keys make no recipe.
    """
    if not recipe.stages:
        return [recipe]
    return [stage_recipe(recipe, number) for number in range(len(recipe.stages))]


def stage_recipe(recipe: Recipe, number: int) -> Recipe:
    """The recipe of stage `number`, from 0."""
    stage = recipe.stages[number]
    values = recipe.model_dump(exclude_unset=True, by_alias=True, exclude={"stages"})
    if recipe.schedule.steps is None:
        values.setdefault("schedule", {})["steps"] = recipe.train.steps
    merge(values, copy.deepcopy(stage.model_dump(exclude={"steps"})))
    values.setdefault("train", {})["steps"] = sum(before.steps for before in recipe.stages[: number + 1])
    return Recipe.model_validate(values)
