"""Plain text: a document, or parts of a long one."""

from collections.abc import Iterator

from lorakit.data.files.stored import Stored, text_of, whole_lines
from lorakit.data.rows import Block, Row


def read(stored: Stored) -> Iterator[Block]:
    """One row of up to 1 MiB; a longer document is read in parts of whole lines. Blank parts are no rows.

    Raises:
        UserError: it is not UTF-8.
    """
    for lines in whole_lines(stored):
        text = text_of(stored.name, lines).replace("\r\n", "\n")
        yield Block(stored.name, lines.first, text, rows, lines.size)


def rows(name: str, first: int, text: str) -> Iterator[Row]:
    if text.strip():
        yield Row(f"{name}:{first}", {"text": text})
