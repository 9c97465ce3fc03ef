"""Rows that begin in a stretch of a stored text file, found without reading what stands before it."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorakit.data.readers import delimited, json_rows
from lorakit.data.readers.json_rows import as_record, parse_value
from lorakit.data.readers.text_stream import BLOCK
from lorakit.data.rows import Row, RowError
from lorakit.recipe.problem import show_path

# A row that begins in the stretch and is not ended this far behind it is left out.
_TAIL = 1 << 20
# Line breaks tried until the records behind one have the header's number of cells: a break may stand in a quoted cell.
_TRIED = 500


def rows_between(path: Path, suffix: str, start: int, stop: int, columns: frozenset[str]) -> list[Row]:
    """The rows of a file that begin from byte `start` up to before `stop`. `columns`: those that rows have.

    Raises:
        OSError: the file cannot be read.
    """
    return list(_READERS[suffix](path, start, stop, columns))


def readable(suffix: str) -> bool:
    """Whether a file of this kind can be read from the middle."""
    return suffix in _READERS


def _lines(path: Path, start: int, stop: int, columns: frozenset[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline(_TAIL)
        whole = []
        while file.tell() < stop:
            line = file.readline(_TAIL)
            if not line:
                break
            if len(line) < _TAIL:
                whole.append(line)
    yield from json_rows.parse_lines(show_path(path), 1, b"".join(whole))


def _objects(path: Path, start: int, stop: int, columns: frozenset[str]) -> Iterator[Row]:
    """Objects of a list: those with the columns of the file's first rows, since an object may stand within another."""
    text, limit = _text(path, start, stop)
    at = text.find("{")
    while 0 <= at < limit:
        try:
            value, end = parse_value(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict) and value.keys() <= columns:
            yield Row(show_path(path), as_record(value))
        else:
            end = at + 1
        at = text.find("{", end)


def _records(path: Path, start: int, stop: int, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        dialect, _, lines = delimited.detect_dialect(iter(file), delimiter)
        header = [cell.strip() for cell in next(csv.reader(lines, **dialect), [])]
    text, limit = _text(path, start, stop)
    breaks = (found.end() for found, _ in zip(re.finditer("\n", text), range(_TRIED), strict=False))
    for begin in breaks if start else iter((text.find("\n") + 1,)):
        records = _split(text[begin:], limit - begin, dialect, len(header)) if begin < limit else []
        if records is not None:
            yield from delimited.parse_rows(show_path(path), 1, (header, [(1, cells) for cells in records]))
            return


def _split(text: str, limit: int, dialect: dict[str, Any], width: int) -> list[list[str]] | None:
    """The records that begin in the first `limit` characters; None where one has another number of cells."""
    lines = io.StringIO(text, newline="").readlines()
    reader, records, position, line = csv.reader(lines, **dialect), [], 0, 0
    try:
        for cells in reader:
            ended = reader.line_num == len(lines)
            if position >= limit or (ended and len(text) > limit):
                break
            position += sum(map(len, lines[line : reader.line_num]))
            line = reader.line_num
            if cells and len(cells) != width:
                return None
            if cells:
                records.append(cells)
    except csv.Error:
        return None
    return records


def _documents(path: Path, start: int, stop: int, columns: frozenset[str]) -> Iterator[Row]:
    """A text file is one row, or one a MiB."""
    for begin in range(-(-start // BLOCK) * BLOCK, stop, BLOCK):
        text, _ = _text(path, begin, begin + BLOCK, tail=0)
        yield Row(show_path(path), {"text": text} if text.strip() else RowError("the text is empty"))


def _text(path: Path, start: int, stop: int, tail: int = _TAIL) -> tuple[str, int]:
    """The text from `start` on and some behind `stop`, and where in it `stop` is, in characters."""
    with path.open("rb") as file:
        file.seek(start)
        raw, behind = file.read(stop - start), file.read(tail)
    return (raw + behind).decode("utf-8", "ignore"), len(raw.decode("utf-8", "ignore"))


_Reader = Callable[[Path, int, int, frozenset[str]], Iterator[Row]]
_READERS: dict[str, _Reader] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _objects,
    ".csv": lambda path, start, stop, columns: _records(path, start, stop, ","),
    ".tsv": lambda path, start, stop, columns: _records(path, start, stop, "\t"),
    ".txt": _documents,
    ".md": _documents,
}
