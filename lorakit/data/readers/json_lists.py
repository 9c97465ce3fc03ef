"""JSON: one list of objects, or objects one behind another, read without holding the file."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from lorakit.data.readers.json_values import as_record, value_at
from lorakit.data.readers.text_stream import BLOCK, NOT_UTF_8, TextStream
from lorakit.data.rows import Block, Row, RowError, kind, normalize_line_ends
from lorakit.errors import UserError

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # byte order marks where files were joined
# How near the end of the text read so far the decoder stops when only the rest is missing: at most a word such as
# `-Infinity`, the exponent of a number, or an escape. An open string is told by its message.
_TAIL = 64
# Characters of one value, which takes several times as much in memory.
_LONGEST = 1 << 28
_OPEN_STRING = "Unterminated string"


def read(stored: TextStream) -> Iterator[Block]:
    """Blocks of parsed values: only a parser knows where one ends.

    Raises:
        UserError: it is not JSON, not UTF-8, or neither a list nor objects; the line is named.
    """
    window = _Window(stored)
    number, done, moved = 1, 0, 0
    values: list[dict[str, Any] | RowError] = []
    for value in _values(window):
        if window.moved > moved and values:
            yield Block(stored.name, number, values, rows, stored.position - done)
            number, done, moved, values = number + len(values), stored.position, window.moved, []
        values.append(as_record(normalize_line_ends(value)))
    if values:
        yield Block(stored.name, number, values, rows, stored.position - done)


def rows(name: str, first: int, values: list[dict[str, Any] | RowError]) -> Iterator[Row]:
    for number, record in enumerate(values, start=first):
        yield Row(f"{name} row {number}", record)


def _values(window: "_Window") -> Iterator[Any]:
    opening = window.next_sign()
    if not opening:
        return
    if opening == "{":
        while window.next_sign():
            yield window.value()
        return
    if opening != "[":
        value = window.value()
        raise UserError(f"{window.name}: a .json file holds a list of objects, or objects; this one {_holds(value)}.")
    window.at += 1
    if window.next_sign() != "]":
        yield window.value()
        while (sign := window.next_sign()) == ",":
            window.at += 1
            if window.next_sign() == "]":
                raise window.wrong("a comma before the end of the list", window.at)
            yield window.value()
        if sign != "]":
            raise window.wrong("Expecting ',' delimiter", window.at)
    window.at += 1
    if window.next_sign():
        raise window.wrong("Extra data", window.at)


def _holds(value: Any) -> str:
    return str(value) if isinstance(value, RowError) else f"holds {kind(value)}"


class _Window:
    """The text of a file from some place on, read as far as needed; `at` is where the reader stands in it."""

    def __init__(self, stored: TextStream) -> None:
        self.name = stored.name
        self.at = 0
        self.moved = 0
        self._stored = stored
        self._text = ""
        self._line, self._column = 1, 0  # lines and characters of the last line before the text held
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def next_sign(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr] # it always matches
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins here, or a RowError for one that is refused.

        Raises:
            UserError: there is none, or its end cannot be told.
        """
        while True:
            try:
                value, end = value_at(self._text, self.at)
            except json.JSONDecodeError as error:
                open_end = error.msg.startswith(_OPEN_STRING) or error.pos + _TAIL > len(self._text)
                if not (open_end and self._more()):
                    raise self.wrong(error.msg, error.pos) from error
            except RecursionError as error:
                raise UserError(
                    f"{self.name}:{self._line_at(self.at)}: no readable JSON: it is nested too deeply."
                ) from error
            else:
                if end + _TAIL < len(self._text) or not self._more():
                    self.at = end
                    return value

    def wrong(self, message: str, at: int) -> UserError:
        before = self._text.rfind("\n", 0, at)
        column = at - before if before >= 0 else self._column + at + 1
        nul = "; the file holds NUL bytes: save it as UTF-8" if "\0" in self._text else ""
        return UserError(f"{self.name}:{self._line_at(at)}: no valid JSON: {message} at column {column}{nul}.")

    def _line_at(self, at: int) -> int:
        return self._line + self._text.count("\n", 0, at)

    def _more(self) -> bool:
        """Forget what is read and read as much again as is left, at least a block; whether there was any."""
        pieces: list[str] = []
        if len(self._text) - self.at > _LONGEST:
            raise UserError(
                f"{self.name}:{self._line_at(self.at)}: a value of more than {_LONGEST >> 20} MiB. Take it out, or "
                "write JSON Lines."
            )
        wanted = max(BLOCK, len(self._text) - self.at)
        while wanted > 0 and (data := self._stored.read()):
            pieces.append(self._decoded(data, pieces))
            wanted -= len(pieces[-1])
        if not pieces:
            self._decoded(b"", pieces)
            return False
        self._line = self._line_at(self.at)
        before = self._text.rfind("\n", 0, self.at)
        self._column = self.at - before - 1 if before >= 0 else self._column + self.at
        self._text = "".join([self._text[self.at :], *pieces])
        self.at = 0
        self.moved += 1
        return True

    def _decoded(self, data: bytes, pieces: list[str]) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            read = self._line_at(len(self._text)) + sum(piece.count("\n") for piece in pieces)
            line = read + error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise UserError(f"{self.name}:{line}: not UTF-8: byte {byte:#04x}. {NOT_UTF_8}") from error
