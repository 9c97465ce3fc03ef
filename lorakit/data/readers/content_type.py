"""Files whose content is not what their names say."""

import json
import re
from pathlib import PurePath

from lorakit.errors import UserError

_HEAD_BYTES = 4096
_SO_TOO = "Give it a name that ends so too, such as {name}"
# How a file begins, what it is then, and what to do.
_CONTENTS = (
    (rb"PAR1", "a Parquet file", "Give it a name that ends in .parquet."),
    (rb"ARROW1", "an Arrow file", "Give it a name that ends in .arrow."),
    (rb"\x1f\x8b", "gzip data", f"{_SO_TOO}.gz."),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", f"{_SO_TOO}.bz2."),
    (rb"\xfd7zXZ\x00", "xz data", f"{_SO_TOO}.xz."),
    (rb"\x28\xb5\x2f\xfd", "zstandard data", f"{_SO_TOO}.zst."),
    (rb"PK\x03\x04", "a zip archive, or an Excel file", "Unpack it, or save the sheet as CSV in UTF-8."),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel file", "Save the sheet as CSV in UTF-8."),
    (rb"SQLite format 3\x00", "an SQLite database", "Export its rows as JSON Lines or CSV."),
    (rb"\x89HDF", "an HDF5 file", "Export its rows as JSON Lines or Parquet."),
    (rb"%PDF-", "a PDF document", "Take its text out first."),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32", "Save it as UTF-8."),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "Save it as UTF-8."),
    (rb"version https://git-lfs\.github\.com/spec/", "a pointer to the file in Git LFS", "Fetch it with git lfs pull."),
    (rb"\x80[\x02-\x05][\x95\]}cK(]", "a Python pickle", "It would run code when read: export its rows as JSON Lines."),
)
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html[\s>])", re.IGNORECASE)
_FIELD = re.compile(r"""["']?\s*[,;\t]\s*["']?""")


def refuse_other_content(name: str, suffix: str, data: bytes) -> None:
    """Refuse, as a `UserError`, a file that begins with what is not text in UTF-8, or a web page in place of the rows.

    `suffix` is the ending of its content, compression aside.
    """
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
    """Refuse, as a `UserError`, a file of JSON Lines that is a JSON list, or objects over several lines.

    `raw`: its first block.
    """
    first = re.compile(rb"\s*([\[{])[^\n]{0,65536}").match(raw)
    if not first:
        return
    line, rest = first[0].strip(), raw[first.end() : first.end() + _HEAD_BYTES].lstrip()
    stem = PurePath(name).name.partition(".")[0]
    if first[1] == b"[" and not (rest and _is_json(line)):  # lists on a line each are refused row by row
        raise UserError(
            f"{name}: the file is one JSON list, and JSON Lines are an object on each line. Give it a name that ends "
            f"in .json, such as {stem}.json."
        )
    if first[1] == b"{" and rest.startswith((b'"', b"}")) and line.endswith((b"{", b",", b"[")):
        raise UserError(
            f"{name}: an object goes over several lines, and in JSON Lines each is on one line. Give the file a "
            f"name that ends in .json, such as {stem}.json, where objects may take several lines."
        )


def detect_rows_in_document(text: str, columns: frozenset[str]) -> tuple[str, str] | None:
    """What kind of rows a text document seems to hold, and the ending for it; None for a document.

    `columns`: names of columns that formats read, two of which make a line a header.
    """
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
