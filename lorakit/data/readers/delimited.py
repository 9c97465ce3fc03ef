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

_LONGEST_CELL = 1 << 26  # characters of four bytes each: a quote that is never closed makes one cell of the rest
_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
_Numbered = tuple[int, list[str]]


def read(stream: TextStream, delimiter: str) -> Iterator[Block]:
    """Blocks of records that are split into cells: only the reader of all lines knows which breaks are in quotes."""
    csv.field_size_limit(_LONGEST_CELL)
    sizes: list[int] = []  # of each piece of the file that is read
    dialect, before, lines = detect_dialect(_lines(stream, sizes), delimiter)
    reader = csv.reader(lines, strict=True, **dialect)
    header: list[str] | None = None
    records: list[_Numbered] = []
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = f"not valid CSV: {error}. Double the quotes inside quoted cells."
            raise UserError(f"{stream.name}:{line}: {what}") from error
        if records and (cells is None or (cells and len(sizes) > 1)):  # this one took another piece of the file
            size = sum(sizes if cells is None else sizes[:-1])
            yield Block(stream.name, records[0][0], (header, records), parse_rows, size)
            records = []
            del sizes[:-1]
        if cells is None:
            return
        if header is None and cells:
            # Excel writes columns without a name after the others.
            header = [cell.strip() for cell in cells]
            twice = [cell for cell, times in Counter(header).items() if cell and times > 1]
            if twice:
                what = f"two columns have the same name: {twice[0]!r}"
                raise UserError(f"{stream.name}:{line}: {what}. Rename one, or take it out.")
        elif cells:  # the record is not blank
            records.append((line, cells))


def parse_rows(name: str, first: int, payload: tuple[list[str], list[_Numbered]]) -> Iterator[Row]:
    """The rows of records below a header. CSV has no null: an empty cell is taken for one, so that a missing answer is
    not trained as an empty one."""
    header, records = payload
    for line, cells in records:
        record: dict[str, Any] | RowError
        if [cell.strip() for cell in cells] == header:
            record = RowError("the row is the header once more, as where files were joined (take it out)")
        elif len(cells) != len(header):
            record = RowError("the row does not fit the header", f"{len(cells)} cells under {len(header)} columns")
        else:
            texts = [cell.replace("\r\n", "\n") for cell in cells]
            record = {column: text or None for column, text in zip(header, texts, strict=True) if column or text}
        yield Row(f"{name}:{line}", record)


def _lines(stream: TextStream, sizes: list[int]) -> Iterator[str]:
    for lines in read_whole_lines(stream):
        decode_lines(stream.name, lines)
        sizes.append(lines.size)
        # Decoded again bit by bit: StringIO would hold four bytes a character.
        yield from io.TextIOWrapper(io.BytesIO(lines.raw), encoding="utf-8", newline="")


def detect_dialect(lines: Iterator[str], usual: str) -> tuple[dict[str, Any], int, Iterator[str]]:
    """How the cells of a file are separated, how many lines say only that, and the lines from the header on. Excel
    writes semicolons in half of Europe, and may say so in a first line `sep=;`. A header without the usual delimiter
    may have another one. Where a blank follows each delimiter of the header, blanks before cells are left out."""
    first = next(lines, "")
    declared = _SEPARATOR.fullmatch(first)
    header = next(lines, "") if declared else first
    bare = re.sub(r'"[^"]*"', "", header)
    likely = usual if usual in bare else max(usual + ",;\t|", key=bare.count)
    delimiter = declared[1] if declared else likely
    names = bare.rstrip("\r\n").split(delimiter)[1:]
    blanks = bool(names) and all(name.startswith(" ") for name in names)
    return {"delimiter": delimiter, "skipinitialspace": blanks}, int(bool(declared)), chain([header], lines)
