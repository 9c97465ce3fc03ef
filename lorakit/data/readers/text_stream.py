"""A text file as bytes: decompressed, refused where its content is not what its name says, and cut into whole lines."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, BinaryIO

from lorakit.data.rows import Block, Row
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

BLOCK = 1 << 20
_HEAD_BYTES = 4096
_LONGEST_LINE = 1 << 28  # bytes: a row takes several times as much in memory, and a small packed file may hold GBs
_BOM = b"\xef\xbb\xbf"
_SO_TOO = "Give it a name that ends so too, such as {name}"
# How a file begins, what it is then, and what to do.
_CONTENTS = (
    (rb"PAR1", "a Parquet file", "Give it a name that ends in .parquet."),
    (rb"ARROW1", "an Arrow file", "Give it a name that ends in .arrow."),
    (rb"\x1f\x8b", "gzip data", f"{_SO_TOO}.gz."),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", f"{_SO_TOO}.bz2."),
    (rb"\xfd7zXZ\x00", "xz data", f"{_SO_TOO}.xz."),
    (rb"\x28\xb5\x2f\xfd", "zstandard data", f"{_SO_TOO}.zst."),
    (rb"PK\x03\x04|\xd0\xcf\x11\xe0", "a zip archive, or an Excel file", "Unpack it, or save it as CSV in UTF-8."),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32", "Save it as UTF-8."),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "Save it as UTF-8."),
    (rb"version https://git-lfs\.github\.com/spec/", "a pointer to the file in Git LFS", "Fetch it with git lfs pull."),
    (rb"\x80[\x02-\x05][\x95\]}cK(]", "a Python pickle", "It would run code when read: export its rows as JSON Lines."),
)
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html[\s>])", re.IGNORECASE)
_FIELD = re.compile(r"""["']?\s*[,;\t]\s*["']?""")


def refuse_other_content(name: str, suffix: str, data: bytes) -> None:
    """Refuse, as a `UserError`, a file that begins with what is not text in UTF-8, or a web page in place of rows."""
    head = data[:_HEAD_BYTES]
    match = next(((what, remedy) for start, what, remedy in _CONTENTS if re.match(start, head)), None)
    if suffix not in (".txt", ".md") and _WEB_PAGE.match(head):
        match = "a web page (HTML), not rows", "Download the file itself; what came may say why it did not."
    if len(head) >= 8 and not (any(head[::2][:32]) and any(head[1::2][:32])) and any(head):
        match = "UTF-16 without a byte order mark", "Save it as UTF-8."
    if match:
        what, remedy = match
        raise UserError(f"{name}: the file is {what}. {remedy.format(name=PurePath(name).name)}")


def refuse_other_columns(name: str, suffix: str, head: bytes) -> None:
    """Refuse, as a `UserError`, a columnar file that is of another kind than its name says."""
    if head.startswith(b"PAR1" if suffix == ".parquet" else b"ARROW1"):
        return
    refuse_other_content(name, suffix, head)
    if start := re.match(rb"(?:\xef\xbb\xbf)?\s*([{\[])", head):
        ending = ".json" if start[1] == b"[" else ".jsonl"
        raise UserError(f"{name}: the file holds JSON. Give it a name that ends in {ending}.")


def refuse_list_as_lines(name: str, raw: bytes) -> None:
    """Refuse, as a `UserError`, a file of JSON Lines whose first block is a JSON list, or objects over several
    lines."""
    first = re.compile(rb"\s*([\[{])[^\n]{0,65536}").match(raw)
    if not first:
        return
    line, rest = first[0].strip(), raw[first.end() : first.end() + _HEAD_BYTES].lstrip()
    what = ""
    if first[1] == b"[" and not (rest and _is_json(line)):  # lists on a line each are refused row by row
        what = "is one JSON list"
    if first[1] == b"{" and rest.startswith((b'"', b"}")) and line.endswith((b"{", b",", b"[")):
        what = "has an object over several lines"
    if what:
        remedy = f"Give it a name that ends in .json, such as {PurePath(name).name.partition('.')[0]}.json."
        raise UserError(f"{name}: the file {what}, and JSON Lines are an object on each line. {remedy}")


def detect_rows_in_document(text: str, columns: frozenset[str]) -> tuple[str, str] | None:
    """What rows a text document seems to hold, and the ending for them; two of `columns` make a line a header."""
    lines = [line for line in text.lstrip("\ufeff").splitlines()[:20] if line.strip()][:3]
    if lines and all(line.lstrip().startswith("{") and _is_json(line) for line in lines):
        return "JSON objects, one a line", ".jsonl"
    start = text.lstrip("\ufeff \t\r\n")
    if re.match(r"\[\s*\{", start) and (_is_json(text) or len(text) >= 1 << 19):
        return "a JSON list", ".json"
    header = {cell.strip(" \"'").lower() for cell in _FIELD.split(lines[0])} if lines else set()
    if len(lines) > 1 and len(header & columns) > 1 and header <= columns | {"id", "", "index"}:
        return "a table with a header", ".tsv" if "\t" in lines[0] else ".csv"
    return None


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _open_zstandard(raw: BinaryIO) -> Any:
    import pyarrow  # Python's library does not have zstandard yet

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    # Arrow gives nothing of a read that meets the end of a cut file: a short read loses little.
    return SimpleNamespace(read1=lambda size: stream.read(min(size, 1 << 14)))


_OPENERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "": ("", lambda raw: raw), ".gz": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    ".bz2": ("bzip2", bz2.BZ2File), ".xz": ("xz", lzma.LZMAFile), ".zst": ("zstandard", _open_zstandard),
}  # fmt: skip


class TextStream:
    """The content of an open file without its byte order mark, read once. `compression`: one of `COMPRESSIONS`, or
    empty; `suffix`: the ending before it. `lines`: the whole lines that are read."""

    def __init__(self, name: str, raw: BinaryIO, compression: str, suffix: str) -> None:
        self.name, self.lines, self.ended = name, 0, False
        self._raw, self._suffix = raw, suffix
        self._compression, opener = _OPENERS[compression]
        self._content = opener(raw)
        self._started = False
        self._fault: Exception | None = None

    @property
    def position(self) -> int:
        """The bytes of the file that are read, before decompression."""
        return self._raw.tell()

    def read(self, size: int = 0) -> bytes:
        """The next `size` bytes, at least a MiB; less at the end or before a fault, nothing after the end. A
        `UserError` where the compressed data is damaged or cut off, or the content is not text."""
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
        how = "cut off" if isinstance(fault, EOFError) or "truncated" in reason.lower() else "damaged"
        what = f"the {self._compression} data is {how} after line {self.lines}"
        if how == "damaged" and not self._started:
            what = f"not a {self._compression} file, whatever its name says"
        return UserError(f"{self.name}: {what}: {reason}. Copy or download the file again.")


@dataclass(frozen=True)
class Lines:
    """Whole lines that end in line feeds."""

    first: int  # the number of the first
    raw: bytes
    size: int  # of them in the file, which may be packed


def read_whole_lines(stream: TextStream) -> Iterator[Lines]:
    """The content in pieces of about 1 MiB, or of one line where that is longer. Carriage returns that end lines alone
    become line feeds: those of a file whose first MiB has no line feed. A `UserError` as of `TextStream.read`, or for a
    line that is too long, comes after the whole lines before it."""
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
    remedy = "Save the file as UTF-8; from Windows or Excel it may be Windows-1252 (iconv -f WINDOWS-1252 -t UTF-8)."
    return UserError(f"{name}:{line}: not UTF-8: byte {error.object[error.start]:#04x}. {remedy}")


def read_documents(stream: TextStream) -> Iterator[Block]:
    """One row of up to 1 MiB; a longer document is read in parts of whole lines. Blank parts are left out."""
    for lines in read_whole_lines(stream):
        text = decode_lines(stream.name, lines).replace("\r\n", "\n")
        yield Block(stream.name, lines.first, text, _document_rows, lines.size)


def _document_rows(name: str, first: int, text: str) -> Iterator[Row]:
    if text.strip():
        yield Row(f"{name}:{first}", {"text": text})
