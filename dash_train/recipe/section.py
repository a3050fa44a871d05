"""What the sections of a recipe share. It imports nothing of ours, so that `model` and `data` can declare theirs."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A recipe section: unknown keys are refused, and values are checked again when they change."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


def flatten_annotation(annotation: Any) -> list[Any]:
    """An annotation's own types: `list[A] | None` has list[A], A and None."""
    return [annotation] + [inner for arg in get_args(annotation) for inner in flatten_annotation(arg)]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
