"""Places: `{column}` in a text of the recipe, where the value of each row's column stands. A value is never read as
such a text itself."""

import functools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from lorakit.data.rows import RowError, kind
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.problem import one_line
from lorakit.registry import NamedColumns

_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
_REMEDY = "Write {column}, or {{ and }} for braces that are meant as they are."
_ABSENT = object()


class PlaceError(ValueError):
    """A text whose places cannot be read: `reason` with the position, and what to write instead."""

    def __init__(self, text: str, start: int, reason: str, remedy: str = _REMEDY) -> None:
        line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
        where = f"line {line}, character {column}" if "\n" in text else f"character {column}"
        super().__init__(f"{where}: {reason}")
        self.reason, self.remedy = str(self), remedy


@functools.lru_cache(maxsize=1024)
def parse_places(text: str) -> tuple[tuple[str, str | None], ...]:
    """A text as pieces: what is written as it is, and the column that stands after it (None at the end). Braces are
    doubled as for Python's `str.format`; of its rules for what is inside, a name alone is left. Raises PlaceError."""
    pieces, literal, end = list[tuple[str, str | None]](), "", 0
    for match in _PIECE.finditer(text):
        literal += text[end : match.start()]
        end, piece = match.end(), match[0]
        if piece in ("{{", "}}"):
            literal += piece[0]
            continue
        _check_place(text, match.start(), piece)
        pieces.append((literal, piece[1:-1]))
        literal = ""
    return (*pieces, (literal + text[end:], None))


def _check_place(text: str, start: int, piece: str) -> None:
    """Refuse, as a PlaceError, what is no column's name in braces."""
    shown, name = one_line(piece), piece[1:-1]
    if len(piece) == 1:
        around = one_line(text[start : start + 20])
        raise PlaceError(text, start, f"{around!r} begins with a brace that has no partner")
    if not name.strip():
        raise PlaceError(text, start, f"{shown} names no column")
    if '"' in name or not name.isprintable():
        raise PlaceError(text, start, f"{shown} is no column's name, but looks like JSON or code")
    sign = next((sign for sign in ":![" if sign in name), None)
    if sign is None:
        return
    what = {":": "a format after the colon", "!": "a conversion after !", "[": "an index in brackets"}[sign]
    bare = name.partition(sign)[0].strip() or "column"
    remedy = f"Write {{{one_line(bare)}}}, or {{{{ and }}}} for braces; a column with {sign} in its name gets another"
    raise PlaceError(text, start, f"{shown} has {what}, and a place holds a name alone", f"{remedy} by data.columns.")


@functools.lru_cache(maxsize=1024)
def columns_in(text: str) -> frozenset[str]:
    """The columns that a text names; none where its places cannot be read."""
    try:
        return frozenset(name for _, name in parse_places(text) if name is not None)
    except PlaceError:
        return frozenset()


def fill_places(text: str, record: Mapping[str, Any], missing: Mapping[str, str] | None = None) -> str:
    """The text with the values of a row; `missing` stands for columns that are absent or null. A `RowError` where it
    does not say what stands there. None: the recipe cannot say it."""
    written = [
        literal if name is None else literal + write_column(record, name, missing)
        for literal, name in parse_places(text)
    ]
    return "".join(written)


def find_value(record: Mapping[str, Any], name: str) -> Any:
    """What a row has under a name: the column of this very name, else the member that it leads to through objects, each
    dot one step in. None where it is null, absent or NaN, as pandas writes what is missing."""
    value = _lookup(record, name)
    return None if value is _ABSENT or (isinstance(value, float) and math.isnan(value)) else value


def _lookup(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    for at, sign in enumerate(name):
        if sign == "." and isinstance(inner := record.get(name[:at]), Mapping):
            value = _lookup(inner, name[at + 1 :])
            if value is not _ABSENT:
                return value
    return _ABSENT


def has_column(records: Collection[Mapping[str, Any]], name: str) -> bool:
    """Whether one of these rows has something under a name, be it null."""
    return any(_lookup(record, name) is not _ABSENT for record in records)


def write_column(record: Mapping[str, Any], name: str, missing: Mapping[str, str] | None = None) -> str:
    """A column's value as text."""
    value = find_value(record, name)
    if value is not None:
        return as_text(value, f"the column {name!r}")
    if missing and name in missing:
        return missing[name]
    hint = "" if missing is None else f" (write missing: {{{name}: ...}} for what stands there then)"
    if _lookup(record, name) is not _ABSENT:
        raise RowError(f"the column {name!r} is null{hint}")
    raise RowError(f"the row has no column {name!r}{hint}", did_you_mean(name, names_in(record)))


def as_text(value: Any, what: str) -> str:
    """A value as a prompt has it: a text as it is, anything else as JSON on one line; days and times as ISO 8601. An
    error calls it `what`."""
    if isinstance(value, str):
        return value
    if isinstance(value, date | time | Decimal):
        return _write_other(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_write_other)
    except (TypeError, ValueError) as error:
        reason = f"{what} can be written neither as text nor as JSON"
        raise RowError(reason, f"{kind(value)}: {error}") from error


def _write_other(value: Any) -> str:
    """What Parquet and Arrow store and JSON does not have."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is none of JSON's values")


def names_in(record: Mapping[str, Any]) -> Iterator[str]:
    """Every name that a place may have in a row: its columns, and the members of objects."""
    for name, value in record.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in names_in(value))


def did_you_mean(name: str, known: Collection[str] | Iterator[str]) -> str:
    """`did you mean 'x'?`, or the names there are."""
    names = list(known)
    near = nearest(name.strip(), names)
    return f"did you mean {near!r}?" if near else f"there are {one_line(', '.join(map(repr, names)), 200)}"


def refuse_absent_columns(
    where: str, named: NamedColumns, records: list[dict[str, Any]], read: Collection[str]
) -> None:
    """Refuse, as a `UserError`, a column that the recipe's texts name and no row has; one that they can do without only
    where a column that nothing reads has nearly its name. `read`: the columns that are read."""
    known = dict.fromkeys(name for record in records for name in names_in(record))
    rows = "no row" if len(records) < 1000 else f"none of the first {len(records):,} rows"
    for name in sorted(named.needed | named.optional):
        if has_column(records, name):
            continue
        candidates = [one for one in known if one not in read] if name in named.optional else list(known)
        near = nearest(name.strip(), candidates)
        if near or name in named.needed:
            remedy = f"Did you mean {{{near}}}?" if near else f"The columns are {one_line(', '.join(known), 200)}."
            raise UserError(f"{where}: data.format names the column {name!r}, which {rows} has. {remedy}")
