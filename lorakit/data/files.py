"""Files: JSON Lines, JSON, CSV and Parquet -> raw rows, each with the place it came from.

A row that cannot be read alone is a `Row` that says why; a file that cannot be read as a whole is a `UserError`.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.formats import RowError, kind
from lorakit.errors import UserError
from lorakit.recipe.problems import shown_path

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Row:
    """One raw record, or why it could not be read, and where it stands."""

    where: str
    record: dict[str, Any] | RowError


def read_file(path: Path) -> Iterator[Row]:
    """Every row of a file, in its order.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    name = shown_path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: rows are read from {', '.join(_READERS)} files, not {path.suffix or 'this'}.")
    try:
        yield from reader(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}.") from error


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _without_bom(raw, name) if number == 1 else raw
            if line.strip():
                yield Row(f"{name}:{number}", _line(line))


def _line(raw: bytes) -> dict[str, Any] | RowError:
    try:
        return _record(json.loads(raw.decode("utf-8"), object_pairs_hook=_object))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"byte {raw[error.start]:#04x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return RowError("no valid JSON", f"{error.msg} at column {error.colno}")
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return RowError("no readable JSON", str(error))


def _json(path: Path, name: str) -> Iterator[Row]:
    try:
        value = json.loads(_text(path, name), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        lines = " One object a line is JSON Lines: name that file .jsonl." if error.msg == "Extra data" else ""
        raise UserError(f"{name}:{error.lineno}: no valid JSON: {error.msg} at column {error.colno}.{lines}") from error
    except (RowError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: no readable JSON: {error}.") from error
    if not isinstance(value, list):
        raise UserError(f"{name}: a .json file holds one list of objects, this one holds {kind(value)}.")
    for number, record in enumerate(value, start=1):
        yield Row(f"{name} row {number}", _record(record))


def _record(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError("the row is not an object with named columns", f"it is {kind(value)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one name Python would keep the last and say nothing."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("an object has the same name twice", repr(twice))
    return record


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    text = _text(path, name)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{name}:{line}: the file holds NUL bytes: it is damaged, or no text. Save it as UTF-8.")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}:{line}: no valid CSV: {error}. Double the quotes inside quoted cells.") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise UserError(f"{name}:{line}: two columns have the same name: {', '.join(header)}.")
        else:
            yield Row(f"{name}:{line}", _under(header, cells))


def _under(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    """CSV has no null: an empty cell is taken for one, so that a missing answer is not trained as an empty one."""
    if len(cells) != len(header):
        return RowError("the row does not fit the header", f"{len(cells)} cells under {len(header)} columns")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise UserError(f"{name}: two columns have the same name: {', '.join(names)}.")
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield Row(f"{name} row {number}", record)
    except (ArrowException, ValueError, OverflowError) as error:
        behind = f" behind row {number}" if number else ""
        raise UserError(f"{name}: no readable Parquet file{behind}: {error}.") from error


def _text(path: Path, name: str) -> str:
    raw = _without_bom(path.read_bytes(), name)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8: byte {raw[error.start]:#04x}. Save the file as UTF-8.") from error


def _without_bom(raw: bytes, name: str) -> bytes:
    if raw.startswith(_UTF_16):
        raise UserError(f"{name}: the file is UTF-16. Save it as UTF-8.")
    return raw.removeprefix(_BOM)


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
