"""What a rule is: a plain function that finds a combination of keys which cannot work."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.recipe.fields import entry_names, entry_settings
from lorakit.recipe.problem import PathParts, quote
from lorakit.recipe.schema import Recipe
from lorakit.registry import AnyTable


@dataclass(frozen=True)
class Conflict:
    """One combination that cannot work, and the key where to say so."""

    path: PathParts
    reason: str
    remedy: str


Rule = Callable[[Recipe, Collection[str]], Iterator[Conflict]]
RULES: list[tuple[Rule, tuple[str, ...]]] = []
"""Every rule with the fields that it reads."""


def reads(*fields: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads these fields."""

    def add(rule: Rule) -> Rule:
        RULES.append((rule, fields))
        return rule

    return add


def bad_pattern(path: PathParts, pattern: str) -> Iterator[Conflict]:
    """What keeps a text from being a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"{quote(pattern)} is not a regular expression: {error}"
        yield Conflict(path, reason, "Correct it, or put a backslash before a character that is meant as it is.")


def choice_mistakes(path: PathParts, table: AnyTable, value: Any, example: str, *beside: Any) -> Iterator[Conflict]:
    """A mapping that names no entry of a table, or several, and settings of an entry that do not fit each other.

    `beside` is what the table's entries are given beside their settings.
    """
    names = entry_names(value)
    if len(names) != 1:
        nouns = f"{table.noun}s"
        reason = f"{' and '.join(names)} are {len(names)} {nouns}" if names else f"it names no {table.noun}"
        yield Conflict(path, reason, f"Write one, such as {example}.")
    elif not isinstance(value, str) and (mistakes := table[names[0]].mistakes):
        for inner, reason, remedy in mistakes(entry_settings(table, value), *beside):
            yield Conflict((*path, names[0], *inner), reason, remedy)
