"""JSON text -> records. What Python's decoder takes for JSON and is none is refused."""

import json
import re
from typing import Any

from lorakit.data.readers.content_type import begins
from lorakit.data.rows import RowError, kind, normalize_line_ends
from lorakit.recipe.problem import one_line

SPACE = " \t\r\n"
_CARRIAGE_RETURN = re.compile(r"\\r|\\u000[dD]")


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
    line = line.rstrip(SPACE).removeprefix("\ufeff")
    start = 0 if line.startswith("{") else len(line) - len(line.lstrip(SPACE))
    try:
        value, end = _DECODER.raw_decode(line, start)
        if end != len(line):
            raise json.JSONDecodeError("Extra data", line, len(line) - len(line[end:].lstrip(SPACE)))
    except json.JSONDecodeError as error:
        return RowError("no valid JSON", f"{error.msg} at column {error.colno}{_hint(line, error)}")
    except RowError as error:
        return error
    except RecursionError:
        return RowError("no readable JSON", "it is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return _unreadable(error)
    # A quick look first: most lines hold no carriage return.
    return as_record(normalize_line_ends(value) if "\\" in line and _CARRIAGE_RETURN.search(line) else value)


def _hint(line: str, error: json.JSONDecodeError) -> str:
    """What seems to be meant by a line that is no JSON."""
    rest = line[error.pos :].strip(SPACE)
    if "\0" in line:
        return "; the line holds NUL bytes"
    if error.msg == "Extra data" and rest == ",":
        return "; a comma stands behind the object, as in a list (take it out)"
    if error.msg == "Extra data" and rest.startswith(("{", "\ufeff{")):
        return "; another object stands behind it (put each on a line of its own, or name the file .json)"
    if line.startswith("{'"):
        return "; Python wrote the row, not JSON (write it with json.dumps)"
    return f"; the line begins with {begins(line)}" if error.pos == 0 else ""


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


def as_record(value: Any) -> dict[str, Any] | RowError:
    """A value as a record: rows are objects."""
    if isinstance(value, dict | RowError):
        return value
    return RowError("the row is not an object with named columns", f"it is {kind(value)}")


def _unreadable(error: Exception) -> RowError:
    return RowError("no readable JSON", str(error))
