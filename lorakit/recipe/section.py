"""What every section of a recipe has in common. It imports nothing of lorakit: tables' entries stand on it too."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Shared manners: unknown keys are errors, values are never coerced, a recipe does not change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
