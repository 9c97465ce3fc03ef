"""JSON Lines: one object a line."""

from collections.abc import Iterator
from typing import Any

from lorakit.data.readers.content_type import refuse_list_as_lines
from lorakit.data.readers.json_values import SPACE, record_of
from lorakit.data.readers.text_stream import TextStream, read_whole_lines
from lorakit.data.rows import Block, Row, RowError

_BLOCK = 1 << 18


def read(stored: TextStream) -> Iterator[Block]:
    """Blocks of whole lines, as bytes; small ones, so that several processes end at about the same time.

    Raises:
        UserError: it is a JSON list, or its objects go over several lines.
    """
    looked = False
    for lines in read_whole_lines(stored):
        if not looked and not lines.raw.isspace():
            looked = True
            refuse_list_as_lines(stored.name, lines.raw)
        first, start, raw = lines.first, 0, lines.raw
        while start < len(raw):
            stop = raw.find(b"\n", start + _BLOCK) + 1
            if not stop or len(raw) - stop < _BLOCK:  # no copy of a line that fills the block
                stop = len(raw)
            piece = raw[start:stop]
            yield Block(
                stored.name, first, piece, parse_rows, lines.size * stop // len(raw) - lines.size * start // len(raw)
            )
            first, start = first + piece.count(b"\n"), stop


def parse_rows(name: str, first: int, raw: bytes) -> Iterator[Row]:
    """A row for each line that is not blank."""
    view = memoryview(raw)  # a line is decoded from where it stands: one of 50 MB is not copied before
    start, number = 0, first
    while start < len(raw):
        stop = raw.find(b"\n", start)
        stop = len(raw) if stop < 0 else stop
        record = _record(view[start:stop])
        if record is not None:
            yield Row(f"{name}:{number}", record)
        start, number = stop + 1, number + 1


def _record(raw: memoryview) -> dict[str, Any] | RowError | None:
    try:
        line = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"byte {raw[error.start]:#04x} at position {error.start + 1}")
    return None if not line or (line.isspace() and not line.strip(SPACE)) else record_of(line)
