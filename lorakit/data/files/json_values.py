"""JSON text -> records. What Python's decoder takes for JSON and is none is refused."""

import json
from typing import Any

from lorakit.data.rows import RowError, kind
from lorakit.recipe.problems import one_line

SPACE = " \t\r\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one name Python would keep the last and say nothing."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("an object has the same name twice", one_line(repr(twice)))
    return record


def _constant(word: str) -> Any:
    raise RowError("no valid JSON", f"{word} is no JSON value: write null or a number")


# Made once: json.loads makes one for each call that names a hook, which takes as long as a short row. The hook itself
# costs some percent.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
# Finds the end of a value that is JSON in all but what `_DECODER` refuses: numbers of thousands of digits stay text.
_LENIENT = json.JSONDecoder(parse_int=str)


def record_of(line: str) -> dict[str, Any] | RowError:
    """The object that a line is, or why it is none."""
    line = line.rstrip(SPACE)
    start = 0 if line.startswith("{") else len(line) - len(line.lstrip(SPACE))
    try:
        value, end = _DECODER.raw_decode(line, start)
        if end != len(line):
            raise json.JSONDecodeError("Extra data", line, len(line) - len(line[end:].lstrip(SPACE)))
    except json.JSONDecodeError as error:
        nul = "; the line holds NUL bytes" if "\0" in line else ""
        return RowError("no valid JSON", f"{error.msg} at column {error.colno}{nul}")
    except RowError as error:
        return error
    except RecursionError:
        return RowError("no readable JSON", "it is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return _unreadable(error)
    return checked(value)


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, or a RowError in its place, and where it ends.

    Raises:
        JSONDecodeError, RecursionError: its end cannot be told.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RowError as error:
        refused = error
    except ValueError as error:
        refused = _unreadable(error)
    return refused, _LENIENT.raw_decode(text, start)[1]


def checked(value: Any) -> dict[str, Any] | RowError:
    """A value as a record: rows are objects."""
    if isinstance(value, dict | RowError):
        return value
    return RowError("the row is not an object with named columns", f"it is {kind(value)}")


def _unreadable(error: Exception) -> RowError:
    return RowError("no readable JSON", str(error))
