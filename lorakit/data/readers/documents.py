"""Plain text: a document, or parts of a long one."""

from collections.abc import Iterator

from lorakit.data.readers.text_stream import TextStream, decode_lines, read_whole_lines
from lorakit.data.rows import Block, Row


def read(stored: TextStream) -> Iterator[Block]:
    """One row of up to 1 MiB; a longer document is read in parts of whole lines. Blank parts are no rows.

    Raises:
        UserError: it is not UTF-8.
    """
    for lines in read_whole_lines(stored):
        text = decode_lines(stored.name, lines).replace("\r\n", "\n")
        yield Block(stored.name, lines.first, text, rows, lines.size)


def rows(name: str, first: int, text: str) -> Iterator[Row]:
    if text.strip():
        yield Row(f"{name}:{first}", {"text": text})
