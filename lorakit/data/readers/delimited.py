"""CSV and TSV: a header, and a row for each record below it."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from lorakit.data.readers.text_stream import TextStream, decode_lines, read_whole_lines
from lorakit.data.rows import Block, Row, RowError
from lorakit.errors import UserError

_LONGEST_CELL = 1 << 26
"""Characters, for which the csv module takes four bytes each: a quote that is never closed makes a cell of the whole
rest of the file."""

_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
_Numbered = tuple[int, list[str]]


def read(stored: TextStream, delimiter: str) -> Iterator[Block]:
    """Blocks of records that are split into cells: only the reader of all lines knows which breaks are in quotes.

    Raises:
        UserError: it is not UTF-8, a quote is wrong, or two columns have one name.
    """
    sizes: list[int] = []
    header: list[str] | None = None
    records: list[_Numbered] = []
    for line, cells in _records(stored, delimiter, sizes):
        if header is None:
            header = parse_header(stored.name, line, cells)
            continue
        if len(sizes) > 1 and records:  # this one took another piece of the file
            yield Block(stored.name, records[0][0], (header, records), parse_rows, sum(sizes[:-1]))
            del sizes[:-1]
            records = []
        records.append((line, cells))
    if header is not None and records:
        yield Block(stored.name, records[0][0], (header, records), parse_rows, sum(sizes))


def parse_rows(name: str, first: int, payload: tuple[list[str], list[_Numbered]]) -> Iterator[Row]:
    header, records = payload
    for line, cells in records:
        yield Row(f"{name}:{line}", _under(header, cells))


def _records(stored: TextStream, delimiter: str, sizes: list[int]) -> Iterator[_Numbered]:
    """Every record that is not blank, with the line where it begins. `sizes` gets what each piece of the file takes."""
    csv.field_size_limit(_LONGEST_CELL)
    dialect, before, lines = detect_dialect(_lines(stored, sizes), delimiter)
    reader = csv.reader(lines, strict=True, **dialect)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{stored.name}:{line}: no valid CSV: {error}. Double the quotes inside quoted cells."
            ) from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _lines(stored: TextStream, sizes: list[int]) -> Iterator[str]:
    for lines in read_whole_lines(stored):
        decode_lines(stored.name, lines)
        sizes.append(lines.size)
        # Decoded again bit by bit: StringIO would hold four bytes a character.
        yield from io.TextIOWrapper(io.BytesIO(lines.raw), encoding="utf-8", newline="")


def detect_dialect(lines: Iterator[str], usual: str) -> tuple[dict[str, Any], int, Iterator[str]]:
    """How the cells of a file are separated, how many lines say only that, and the lines from the header on.

    Excel writes semicolons in half of Europe, and may say so in a first line `sep=;`. A header without the usual sign
    that has another has it between its cells. Where a blank stands behind each sign, cells begin behind the blank.
    """
    first, before = next(lines, ""), 0
    said = _SEPARATOR.fullmatch(first)
    if said:
        first, before = next(lines, ""), 1
    bare = re.sub(r'"[^"]*"', "", first)
    delimiter = said[1] if said else usual
    if delimiter not in bare and not said:
        delimiter = max(",;\t|", key=bare.count) if any(sign in bare for sign in ",;\t|") else usual
    names = bare.rstrip("\r\n").split(delimiter)[1:]
    blanks = bool(names) and all(name.startswith(" ") for name in names)
    return {"delimiter": delimiter, "skipinitialspace": blanks}, before, chain([first], lines)


def parse_header(name: str, line: int, cells: list[str]) -> list[str]:
    """The names of the columns; Excel writes columns without one behind the others.

    Raises:
        UserError: two are the same.
    """
    cells = [cell.strip() for cell in cells]
    twice = [cell for cell, times in Counter(cells).items() if cell and times > 1]
    if twice:
        raise UserError(f"{name}:{line}: two columns have the same name: {twice[0]!r}. Rename one, or take it out.")
    return cells


def _under(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    """CSV has no null: an empty cell is taken for one, so that a missing answer is not trained as an empty one."""
    if [cell.strip() for cell in cells] == header:
        return RowError("the row is the header once more, as where files were joined (take it out)")
    if len(cells) != len(header):
        return RowError("the row does not fit the header", f"{len(cells)} cells under {len(header)} columns")
    if any("\r\n" in cell for cell in cells):
        cells = [cell.replace("\r\n", "\n") for cell in cells]
    return {column: cell or None for column, cell in zip(header, cells, strict=True) if column or cell}
