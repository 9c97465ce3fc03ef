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
