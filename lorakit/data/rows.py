"""Rows: raw records with the place each came from, and why one could not be used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class RowError(Exception):
    """One row cannot become an example; the caller knows which row.

    `reason` is the same for all rows that fail alike, so that they can be counted; `case` is what this row has.
    """

    def __init__(self, reason: str, case: str = "") -> None:
        super().__init__(f"{reason}: {case}" if case else reason)
        self.reason = reason
        self.case = case

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.reason, self.case)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), type(value).__name__)


def normalize_line_ends(value: Any) -> Any:
    """The same with `\\r\\n` as `\\n` in all texts: a row says the same whichever file and program it came from."""
    try:
        return _unified(value)
    except RecursionError:
        return RowError("the row is nested too deeply")


def _unified(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n") if "\r\n" in value else value
    if isinstance(value, dict):
        return {key: _unified(inner) for key, inner in value.items()}
    if isinstance(value, list) and not (value and isinstance(value[0], int)):  # no walk through token ids
        return [_unified(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Row:
    """One raw record, or why it could not be read, and where it stands."""

    where: str
    record: dict[str, Any] | RowError


@dataclass(frozen=True)
class Block:
    """Some rows of one source that are not parsed yet: they can be handed to another process as they are.

    `parse(name, first, payload)` gives the rows; `name` is the file as messages name it, `first` the number of the
    first line or row. `size` is how many bytes of the source (as stored) the block stands for.
    """

    name: str
    first: int
    payload: Any
    parse: Callable[[str, int, Any], Iterator[Row]]
    size: int

    def rows(self) -> Iterator[Row]:
        return self.parse(self.name, self.first, self.payload)
