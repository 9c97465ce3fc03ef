"""What a recipe's `format` or `kind` says: the name of a table's entry, and its settings.

A value is a word, or a section made by lorakit/recipe/choice_field.py of which one field is filled.
"""

import functools
from typing import Any

from lorakit.recipe.section import Section
from lorakit.registry import AnyTable


def entry_names(value: Any) -> list[str]:
    """The entries that a value names: one, unless the recipe is wrong."""
    if isinstance(value, str):
        return [value]
    return [name for name in type(value).model_fields if getattr(value, name) is not None]


def entry_name(value: Any) -> str:
    """The entry's name, or a word such as `auto` that the key takes besides."""
    return entry_names(value)[0]


def entry_settings(table: AnyTable, value: Any) -> Any:
    """The entry's settings, its defaults where the value is a word; None for an entry, or a word, that has none."""
    if isinstance(value, str):
        return _defaults(table, value) if value in table else None
    return getattr(value, entry_name(value))


@functools.cache
def _defaults(table: AnyTable, name: str) -> Section | None:
    settings = table[name].settings
    return settings() if settings else None
