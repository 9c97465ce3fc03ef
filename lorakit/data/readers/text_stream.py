"""A text file as bytes: decompressed, in pieces of about 1 MiB, and cut into whole lines."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO

from lorakit.data.readers.content_type import refuse_other_content
from lorakit.data.rows import Block, Row
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

BLOCK = 1 << 20
_LONGEST_LINE = 1 << 28
"""Bytes: a row takes several times as much in memory, and a compressed file of a few MB may hold a line of GBs."""
_NOT_UTF_8 = "Save the file as UTF-8; from Windows or Excel it may be Windows-1252 (iconv -f WINDOWS-1252 -t UTF-8)."
_BOM = b"\xef\xbb\xbf"


def _open_zstandard(raw: BinaryIO) -> Any:
    """As `GzipFile`: Python's library does not have zstandard yet."""
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    # Arrow gives nothing of a read that meets the end of a cut file: a short read loses little.
    return SimpleNamespace(read1=lambda size: stream.read(min(size, 1 << 14)))


_OPENERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "": ("", lambda raw: raw),
    ".gz": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    ".bz2": ("bzip2", bz2.BZ2File),
    ".xz": ("xz", lzma.LZMAFile),
    ".zst": ("zstandard", _open_zstandard),
}


class TextStream:
    """The content of an open file without its byte order mark, read once from its beginning.

    `compression`: one of `COMPRESSIONS`, or empty; `suffix`: the ending before it. `position`: the bytes of the file
    that are read, before decompression; `lines`: the whole lines of the content that are read; `ended`: all is read.
    """

    def __init__(self, name: str, raw: BinaryIO, compression: str, suffix: str) -> None:
        self.name = name
        self._suffix = suffix
        self.lines = 0
        self.ended = False
        self._raw = raw
        self._compression, opener = _OPENERS[compression]
        self._content = opener(raw)
        self._started = False
        self._fault: Exception | None = None

    @property
    def position(self) -> int:
        return self._raw.tell()

    def read(self, size: int = 0) -> bytes:
        """The next `size` bytes, at least a MiB; less at the end or before a fault, and nothing after the end.

        A `UserError` where the compressed data is damaged or cut off, or the content is not text.
        """
        pieces: list[bytes] = []
        missing = max(BLOCK, size) + 1  # one more than a block: a file of one block is known to have ended
        while missing and not self.ended and not self._fault:
            try:
                piece: bytes = self._content.read1(missing)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the decompressor's
                    raise
                self._fault = error
                break
            self.ended = not piece
            pieces.append(piece)
            missing -= len(piece)
        if self._fault and not any(pieces):
            raise self._damaged(self._fault) from self._fault
        data = b"".join(pieces)
        if not self._started:
            self._started = True
            refuse_other_content(self.name, self._suffix, data)
            while data.startswith(_BOM):  # more than one where files were joined
                data = data.removeprefix(_BOM)
        self.lines += data.count(b"\n")
        return data

    def _damaged(self, fault: Exception) -> UserError:
        reason = one_line(str(fault), 200).rstrip(".")
        if isinstance(fault, EOFError) or "truncated" in reason.lower():
            what = f"the {self._compression} data is cut off after line {self.lines}"
        elif not self._started:
            what = f"not a {self._compression} file, whatever its name says, or damaged at its beginning"
        else:
            what = f"the {self._compression} data is damaged; {self.lines} lines could be read"
        return UserError(f"{self.name}: {what}: {reason}. Copy or download the file again.")


@dataclass(frozen=True)
class Lines:
    """Whole lines that end in line feeds: the number of the first, their bytes, and the size of them in the file."""

    first: int
    raw: bytes
    size: int


def read_whole_lines(stream: TextStream) -> Iterator[Lines]:
    """The content in pieces of about 1 MiB, or of one line where that is longer; up to 1 MiB in one piece.

    Carriage returns that end lines alone become line feeds: those of a file whose first MiB has no line feed. A
    `UserError` as of `TextStream.read`, or for a line that is too long, comes after the whole lines before it.
    """
    first, position, end = 1, 0, b""
    waiting: list[bytes] = []
    while data := stream.read():
        end = end or (b"\r" if b"\r" in data and b"\n" not in data else b"\n")
        cut = len(data) if stream.ended else data.rfind(end) + 1
        waiting.append(data[:cut] if cut else data)
        if not cut:
            if sum(map(len, waiting)) > _LONGEST_LINE:
                what = f"a line of more than {_LONGEST_LINE >> 20} MiB"
                raise UserError(f"{stream.name}:{first}: {what}. Take it out, or break it up.")
            continue
        raw = b"".join(waiting)
        waiting = [data[cut:]] if cut < len(data) else []
        raw = raw if end == b"\n" else raw.replace(b"\r", b"\n")
        if _BOM in raw:  # where files were joined
            raw = raw.replace(b"\n" + _BOM, b"\n").removeprefix(_BOM)
        yield Lines(first, raw, stream.position - position)
        first, position = first + raw.count(b"\n"), stream.position
        del raw, data  # the next line may be as long: only one of them is in memory
    if waiting:
        yield Lines(first, b"".join(waiting), stream.position - position)


def decode_lines(name: str, lines: Lines) -> str:
    """Lines as text. A `UserError` names the line where they are not UTF-8, or hold NUL bytes."""
    at = lines.raw.find(b"\0")
    if at >= 0:
        number = lines.first + lines.raw.count(b"\n", 0, at)
        raise UserError(f"{name}:{number}: the file holds NUL bytes: it is damaged, or not text. Save it as UTF-8.")
    try:
        return lines.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf_8(name, lines.first, error) from error


def not_utf_8(name: str, first: int, error: UnicodeDecodeError) -> UserError:
    """The error for bytes, from the line `first` on, that are not UTF-8."""
    line = first + error.object.count(b"\n", 0, error.start)
    return UserError(f"{name}:{line}: not UTF-8: byte {error.object[error.start]:#04x}. {_NOT_UTF_8}")


def read_documents(stream: TextStream) -> Iterator[Block]:
    """One row of up to 1 MiB; a longer document is read in parts of whole lines. Blank parts are left out."""
    for lines in read_whole_lines(stream):
        text = decode_lines(stream.name, lines).replace("\r\n", "\n")
        yield Block(stream.name, lines.first, text, _document_rows, lines.size)


def _document_rows(name: str, first: int, text: str) -> Iterator[Row]:
    if text.strip():
        yield Row(f"{name}:{first}", {"text": text})
