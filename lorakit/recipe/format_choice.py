"""What a recipe's `format` says: a format's name, and its settings.

A value is a word, or a `FormatSettings` (lorakit/recipe/format_field.py) of which one field is filled.
"""

import functools
from typing import Any

from lorakit.recipe.section import Section
from lorakit.tables import FORMATS


def chosen(value: Any) -> list[str]:
    """The formats that a value names: one, unless the recipe is wrong."""
    if isinstance(value, str):
        return [value]
    return [name for name in type(value).model_fields if getattr(value, name) is not None]


def format_name(value: Any) -> str:
    """`auto`, or an entry of the table."""
    return chosen(value)[0]


def format_settings(value: Any) -> Section | None:
    """The settings, or the defaults where the value is a word; None for `auto` and for a format that has none."""
    if isinstance(value, str):
        return None if value == "auto" else _defaults(value)
    settings: Section = getattr(value, format_name(value))
    return settings


@functools.cache
def _defaults(name: str) -> Section | None:
    settings: type[Section] | None = FORMATS[name].facts.get("settings")
    return settings() if settings else None
