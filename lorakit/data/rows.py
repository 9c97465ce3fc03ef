"""Rows: raw records with their places, why one could not be used, and the JSON in which they are written."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.recipe.problem import one_line

_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
_KINDS |= {str: "a text", list: "a list", dict: "an object"}


class RowError(Exception):
    """One row cannot become an example; the caller knows which. `reason` is the same for all rows that fail alike, so
    that they can be counted; `case` is what this row has."""

    def __init__(self, reason: str, case: str = "") -> None:
        super().__init__(f"{reason}: {case}" if case else reason)
        self.reason = reason
        self.case = case

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.reason, self.case)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), type(value).__name__)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would silently keep the last of two values under one name."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("an object has the same name twice", one_line(repr(twice)))
    return record


def _refuse_constant(word: str) -> Any:
    raise RowError("not valid JSON", f"{word} is not a JSON value: write null or a number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
"""Refuses, as a `RowError`, what Python's decoder takes although it is not JSON. Made once: json.loads makes one for
each call that names a hook, which takes as long as a short row."""


def normalize_line_ends(value: Any) -> Any:
    """`value` with `\\r\\n` as `\\n` in all texts; a `RowError` for a value that is nested too deeply."""

    def normalized(inner: Any) -> Any:
        if isinstance(inner, str):
            return inner.replace("\r\n", "\n") if "\r\n" in inner else inner
        if isinstance(inner, dict):
            return {key: normalized(item) for key, item in inner.items()}
        if isinstance(inner, list) and not (inner and isinstance(inner[0], int)):  # no walk through token ids
            return [normalized(item) for item in inner]
        return inner

    try:
        return normalized(value)
    except RecursionError:
        return RowError("the row is nested too deeply")


@dataclass(frozen=True)
class Row:
    """One raw record, or why it could not be read, and its place, such as `train.jsonl:17`."""

    where: str
    record: dict[str, Any] | RowError


@dataclass(frozen=True)
class Block:
    """Some rows of one source that are not parsed yet: they can be handed to another process as they are. `parse(name,
    first, payload)` gives the rows; `name` is the file as messages name it, `first` the number of the first line or
    row. `size` is how many bytes of the source (as stored) the block stands for."""

    name: str
    first: int
    payload: Any
    parse: Callable[[str, int, Any], Iterator[Row]]
    size: int

    def rows(self) -> Iterator[Row]:
        return self.parse(self.name, self.first, self.payload)


def block_of(rows: list[Row]) -> Block:
    """Rows that are parsed already as a block."""
    return Block(rows[0].where if rows else "", 1, rows, lambda name, first, parsed: iter(parsed), 0)
