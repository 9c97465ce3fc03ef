"""JSON Lines, and JSON files of one list or of objects after each other, read without holding the file."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from lorakit.data.readers.text_stream import TextStream, not_utf_8, read_whole_lines, refuse_list_as_lines
from lorakit.data.rows import STRICT_JSON, Block, Row, RowError, kind, normalize_line_ends
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

_BLOCK_OF_LINES = 1 << 18  # bytes; small, so that several processes end at about the same time
_SPACE = " \t\r\n"
_SPACE_AND_MARKS = re.compile(r"[ \t\r\n\ufeff]*")  # byte order marks where files were joined
_CARRIAGE_RETURN = re.compile(r"\\r|\\u000[dD]")
# How near the end of the text read so far the decoder stops when only the rest is missing: at most a word such as
# `-Infinity`, the exponent of a number, or an escape. An open string is told by its message.
_TAIL = 64
_LONGEST_VALUE = 1 << 28  # characters, which take several times as much in memory
_LENIENT_JSON = json.JSONDecoder(parse_int=str)  # finds the end of a value that `STRICT_JSON` refuses


def read_lines(stream: TextStream) -> Iterator[Block]:
    """Blocks of whole lines of JSON Lines, as bytes."""
    checked = False
    for lines in read_whole_lines(stream):
        if not checked and not lines.raw.isspace():
            checked = True
            refuse_list_as_lines(stream.name, lines.raw)
        first, start, raw = lines.first, 0, lines.raw
        while start < len(raw):
            stop = raw.find(b"\n", start + _BLOCK_OF_LINES) + 1
            if not stop or len(raw) - stop < _BLOCK_OF_LINES:  # no copy of a line that fills the block
                stop = len(raw)
            piece = raw[start:stop]
            size = lines.size * stop // len(raw) - lines.size * start // len(raw)
            yield Block(stream.name, first, piece, parse_lines, size)
            first, start = first + piece.count(b"\n"), stop


def parse_lines(name: str, first: int, raw: bytes) -> Iterator[Row]:
    """A row for each line that is not blank."""
    view = memoryview(raw)  # a line is decoded where it is: one of 50 MB is not copied before
    start, number = 0, first
    while start < len(raw):
        stop = raw.find(b"\n", start)
        stop = len(raw) if stop < 0 else stop
        try:
            line = str(view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            case = f"byte {raw[start + error.start]:#04x} at position {error.start + 1}"
            yield Row(f"{name}:{number}", RowError("not UTF-8", case))
        else:
            if line and not (line.isspace() and not line.strip(_SPACE)):
                yield Row(f"{name}:{number}", _parse_line(line))
        start, number = stop + 1, number + 1


def _parse_line(line: str) -> dict[str, Any] | RowError:
    line = line.rstrip(_SPACE).removeprefix("\ufeff")
    start = 0 if line.startswith("{") else len(line) - len(line.lstrip(_SPACE))
    try:
        value, end = parse_value(line, start)
        if end != len(line) and not isinstance(value, RowError):
            raise json.JSONDecodeError("Extra data", line, len(line) - len(line[end:].lstrip(_SPACE)))
    except json.JSONDecodeError as error:
        return RowError("not valid JSON", f"{error.msg} at column {error.colno}{_hint(line, error)}")
    except RecursionError:
        return RowError("unreadable JSON", "it is nested too deeply")
    # A quick look first: most lines hold no carriage return.
    return _as_record(normalize_line_ends(value) if "\\" in line and _CARRIAGE_RETURN.search(line) else value)


def _hint(line: str, error: json.JSONDecodeError) -> str:
    rest = line[error.pos :].strip(_SPACE) if error.msg == "Extra data" else ""
    if rest == ",":
        return "; a comma follows the object, as in a list (take it out)"
    if rest.startswith(("{", "\ufeff{")):
        return "; another object follows it (put each on a line of its own, or name the file .json)"
    if line.startswith("{'"):
        return "; Python wrote the row, not JSON (write it with json.dumps)"
    return f"; the line begins with {one_line(repr(line[:40]), 60)}" if error.pos == 0 else ""


def parse_value(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, or a RowError in its place, and where it ends. Raises JSONDecodeError or
    RecursionError where its end cannot be told."""
    try:
        return STRICT_JSON.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except (RowError, ValueError) as error:  # a ValueError: a number of thousands of digits
        refused = error if isinstance(error, RowError) else RowError("unreadable JSON", str(error))
    return refused, _LENIENT_JSON.raw_decode(text, start)[1]


def _as_record(value: Any) -> dict[str, Any] | RowError:
    is_row = isinstance(value, dict | RowError)
    return value if is_row else RowError("the row is not an object with named columns", f"it is {kind(value)}")


def read_values(stream: TextStream) -> Iterator[Block]:
    """Blocks of the parsed values of a .json file. A `UserError` names the line where it is not a list or objects in
    JSON."""
    window = _Window(stream)
    number, done, reads = 1, 0, 0
    records: list[dict[str, Any] | RowError] = []
    for value in _values(window):
        if window.reads > reads and records:
            yield Block(stream.name, number, records, _rows_of_values, stream.position - done)
            number, done, reads, records = number + len(records), stream.position, window.reads, []
        records.append(_as_record(normalize_line_ends(value)))
    if records:
        yield Block(stream.name, number, records, _rows_of_values, stream.position - done)


def _rows_of_values(name: str, first: int, records: list[dict[str, Any] | RowError]) -> Iterator[Row]:
    return (Row(f"{name} row {number}", record) for number, record in enumerate(records, start=first))


def _values(window: "_Window") -> Iterator[Any]:
    opening = window.next_sign()
    if opening and opening not in "[{":
        value = window.value()
        what = str(value) if isinstance(value, RowError) else f"holds {kind(value)}"
        raise UserError(f"{window.name}: a .json file holds a list of objects, or objects; this one {what}.")
    end = "]" if opening == "[" else ""
    window.at += len(end)
    while window.next_sign() != end:
        yield window.value()
        if end and (sign := window.next_sign()) != end:
            if sign != ",":
                raise window.error("Expecting ',' delimiter", window.at)
            window.at += 1
            if window.next_sign() == end:
                raise window.error("a comma before the end of the list", window.at)
    window.at += len(end)
    if window.next_sign():
        raise window.error("Extra data", window.at)


class _Window:
    """The text of a file from some place on, read as far as needed. `at`: the reader's place in it."""

    def __init__(self, stream: TextStream) -> None:
        self.name, self.at, self.reads = stream.name, 0, 0
        self._stream, self._text = stream, ""
        self._line, self._column = 1, 0  # lines, and characters of the last line, before `_text`
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def next_sign(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            self.at = _SPACE_AND_MARKS.match(self._text, self.at).end()  # type: ignore[union-attr] # it always matches
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._read_more():
                return ""

    def value(self) -> Any:
        """The value that begins here, or a RowError for one that is refused."""
        while True:
            try:
                value, end = parse_value(self._text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos + _TAIL > len(self._text)
                if not (is_cut and self._read_more()):
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                line, _ = self._place(self.at)
                raise UserError(f"{self.name}:{line}: unreadable JSON: it is nested too deeply.") from error
            else:
                if end + _TAIL < len(self._text) or not self._read_more():
                    self.at = end
                    return value

    def error(self, message: str, at: int) -> UserError:
        line, column = self._place(at)
        return UserError(f"{self.name}:{line}: not valid JSON: {message} at column {column + 1}.")

    def _place(self, at: int) -> tuple[int, int]:
        """The line of a place, and the characters before it in that line."""
        before = self._text.rfind("\n", 0, at) + 1
        return self._line + self._text.count("\n", 0, at), at - before + (0 if before else self._column)

    def _read_more(self) -> bool:
        """Forget what is read and read as much again as is left, at least a block; whether there was any."""
        rest = self._text[self.at :]
        if len(rest) > _LONGEST_VALUE:
            what = f"a value of more than {_LONGEST_VALUE >> 20} MiB. Take it out, or write JSON Lines."
            raise UserError(f"{self.name}:{self._place(self.at)[0]}: {what}")
        data = self._stream.read(len(rest))
        try:
            piece = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf_8(self.name, self._place(len(self._text))[0], error) from error
        if not data:
            return False
        self._line, self._column = self._place(self.at)
        self._text, self.at, self.reads = rest + piece, 0, self.reads + 1
        return True
