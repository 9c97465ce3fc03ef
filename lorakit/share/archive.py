"""The form of a packed run: a tar file whose first member is an index with the size and the sha256 of every other one,
which follow in its order. Nothing of the machine that packed it, or of the time, is in a header."""

import gzip
import io
import json
import re
import shutil
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from lorakit.amounts import decimal_bytes
from lorakit.atomic_io import atomic_file, sha256_of
from lorakit.errors import LorakitError, UserError, first_line
from lorakit.recipe.problem import one_line, quote

INDEX = "pack.json"
FORMAT = 1
"""The version of the index. It grows when a field is removed or changes its meaning."""
PARTS = ("recipe.yaml", "manifest.json", "log.jsonl", "adapter", "model", "merged", "eval", "rows", "files")
"""What a packed run may have at its top."""
SUFFIXES = (".tar.zst", ".tar.gz", ".tar")
_MOST_FILES, _MOST_INDEX, _MOST_PADDING = 10_000, 8 << 20, 1 << 20
_BLOCK, _PIECE, _LONGEST = 512, 1 << 20, tarfile.LENGTH_NAME
_LONGEST_TOP = 100
_LEVEL = 6  # of gzip: weights hardly shrink at any
_ZSTD, _GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"


class _EndsEarly(EOFError):
    """A stream that was read to its end has fewer bytes than it should."""


class _LeftOpen(io.RawIOBase):
    """A file that whoever opened it closes: pyarrow closes what it writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self._file.write(content)


def suffix_of(target: Path) -> str:
    """The ending that tells how an archive is compressed; UserError for any other."""
    suffix = next((suffix for suffix in SUFFIXES if target.name.endswith(suffix) and target.name != suffix), None)
    if suffix is None:
        raise UserError(f"--output {target}: its name tells the form. Write one that ends in {', '.join(SUFFIXES)}.")
    return suffix


def write_archive(
    target: Path, top: str, facts: Mapping[str, Any], contents: Mapping[str, bytes | Path]
) -> dict[str, Any]:
    """Write a packed run, whose files lie below `top`, complete or not at all; its index. `facts`: what that says
    besides. UserError where a name cannot be in an archive."""
    suffix, names = suffix_of(target), sorted(contents)
    top = top.encode()[:_LONGEST_TOP].decode("utf-8", "ignore")
    check_names(names)
    files = {name: {"bytes": _size(contents[name]), "sha256": _digest(contents[name])} for name in names}
    document = {"format": FORMAT, **facts, "files": files}
    index = index_text(document).encode()
    with atomic_file(target) as raw, _compressed(raw, suffix) as out:
        _write_member(out, f"{top}/{INDEX}", index, sha256(index).hexdigest())
        for name in names:
            _write_member(out, f"{top}/{name}", contents[name], str(files[name]["sha256"]))
        out.write(bytes(2 * _BLOCK))
    return document


def index_text(index: Mapping[str, Any]) -> str:
    """An index as it stands in its file."""
    return json.dumps(index, indent=1, ensure_ascii=False) + "\n"


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _digest(content: bytes | Path) -> str:
    return sha256_of(content) if isinstance(content, Path) else sha256(content).hexdigest()


@contextmanager
def _compressed(raw: BinaryIO, suffix: str) -> Iterator[Any]:
    if suffix == ".tar":
        yield raw
    elif suffix == ".tar.gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=_LEVEL) as out:
            yield out
    else:
        with pa.CompressedOutputStream(pa.PythonFile(_LeftOpen(raw), mode="w"), "zstd") as out:
            yield out


def _write_member(out: Any, name: str, content: bytes | Path, digest: str) -> None:
    """One file, whose content must be what the index says: another program may be writing it."""
    info = tarfile.TarInfo(name)  # with time 0, mode 644 and no owner
    info.size = _size(content)
    short = len(name.encode()) <= tarfile.LENGTH_NAME  # GNU's headers have any size, POSIX's long names
    out.write(info.tobuf(tarfile.GNU_FORMAT if short else tarfile.USTAR_FORMAT, "utf-8", "strict"))
    hashed, size = sha256(), 0
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        while piece := file.read(_PIECE):
            out.write(piece)
            hashed.update(piece)
            size += len(piece)
    if size != info.size or hashed.hexdigest() != digest:
        raise LorakitError(f"{name}: changed while it was packed. Pack again when nothing writes there.")
    out.write(bytes(-size % _BLOCK))


def check_names(names: Iterable[str]) -> None:
    """Refuse names that lead out of a folder, that a file system could take for each other, or that no run has."""
    paths: dict[str, tuple[str, bool]] = {}  # as a file system that ignores case has it -> as it is, and is it a file
    for name in names:
        shown = quote(one_line(name, 200))
        if reason := why_refused(name):
            raise UserError(f"the name {shown} {reason}.")
        parts = name.split("/")
        for end in range(1, len(parts) + 1):
            path, is_file = "/".join(parts[:end]), end == len(parts)
            folded = unicodedata.normalize("NFC", path).casefold()
            before = paths.setdefault(folded, (path, is_file)) if not is_file or folded in paths else None
            if before and (is_file or before != (path, False)):
                raise UserError(
                    f"the names {quote(one_line(before[0], 200))} and {shown} are the same to some systems."
                )
            paths[folded] = (path, is_file)


def why_refused(name: str) -> str | None:
    """Why a file of this name is not packed or unpacked, as the rest of a sentence; None where it is."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return "leads out of the run"
    if any(not part or part.startswith(".") for part in parts):
        return "is hidden, or empty in a part"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a character that is not allowed"
    if len(name.encode("utf-8", "replace")) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    is_file = len(parts) == 1
    return None if parts[0] in PARTS and is_file == ("." in parts[0]) else "is none that a run has"


@contextmanager
def open_archive(file: Path) -> Iterator[BinaryIO]:
    """The tar stream of an archive, whatever its name is; UserError where it is damaged or cut short."""
    try:
        with file.open("rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            if start.startswith(_ZSTD):
                yield pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            elif start.startswith(_GZIP):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
            else:
                yield raw
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{file}: is cut short or damaged: {first_line(error)}.") from error
    except OSError as error:
        if error.errno is not None:  # the system's own, not pyarrow's
            raise
        raise UserError(f"{file}: is cut short or damaged: {first_line(error)}.") from error


def read_index(stream: BinaryIO) -> tuple[str, dict[str, Any]]:
    """The name at the top of an archive, and its index, which is checked; UserError."""
    try:
        name, size = _read_header(stream) or ("", 0)
    except _EndsEarly as error:
        raise UserError(
            "not a packed run: it is shorter than the beginning of one. lorakit pack writes one."
        ) from error
    top, _, rest = name.partition("/")
    if rest != INDEX or not top or top.startswith(".") or not top.isprintable() or "\\" in top:
        raise UserError(f"not a packed run: it does not begin with {INDEX}. lorakit pack writes one.")
    if size > _MOST_INDEX:
        raise UserError(f"its index takes {decimal_bytes(size)}, and none takes over {decimal_bytes(_MOST_INDEX)}.")
    try:
        index = json.loads(_read_exactly(stream, size))
        _skip_padding(stream, size)
        number, files = index["format"], index["files"]
        if number != FORMAT:
            raise UserError(
                f"its index has the format {number!r}, and this lorakit reads {FORMAT}. Use the one that made it."
            )
        sizes = [one["bytes"] for one in files.values()]
        right = all(type(size) is int and size >= 0 for size in sizes)
        right &= all(re.fullmatch("[0-9a-f]{64}", one["sha256"]) is not None for one in files.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"its index ({INDEX}) is damaged: {first_line(error)}.") from error
    if not right:
        raise UserError(f"its index ({INDEX}) is damaged: a size or a sha256 is none.")
    if len(files) > _MOST_FILES:
        raise UserError(f"its index names {len(files):,} files, and no run has over {_MOST_FILES:,}.")
    check_names(files)
    if missing := [name for name in PARTS[:2] if name not in files]:
        raise UserError(f"its index does not name {missing[0]}, without which it is not a run.")
    return top, index


def write_files(stream: BinaryIO, top: str, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write the files of an index into an empty folder, each with the size and the sha256 that the index says, and
    nothing besides them; UserError where the archive has anything else."""
    for name in sorted(files):
        header = _read_header(stream)
        if header is None:
            raise UserError(f"{name}: is in the index and not in the archive.")
        if header[0] != f"{top}/{name}":
            raise UserError(f"{quote(one_line(header[0], 200))} is where the index has {name}.")
        size = files[name]["bytes"]
        if header[1] != size:
            raise UserError(f"{name}: takes {header[1]:,} bytes, and the index says {size:,}.")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        hashed, left = sha256(), size
        with target.open("xb") as out:
            while left:
                piece = _read_exactly(stream, min(left, _PIECE))
                hashed.update(piece)
                out.write(piece)
                left -= len(piece)
        if hashed.hexdigest() != files[name]["sha256"]:
            raise UserError(f"{name}: is not what was packed: its sha256 is not that of the index.")
        _skip_padding(stream, size)
    if (header := _read_header(stream)) is not None:
        raise UserError(f"{quote(one_line(header[0], 200))} is in the archive and not in the index.")
    if any(_read_exactly(stream, _BLOCK)):  # a tar file ends with two empty blocks
        raise UserError("something follows after its end.")
    padding = 0
    while piece := stream.read(_PIECE):
        padding += len(piece)
        if any(piece) or padding > _MOST_PADDING:
            raise UserError("something follows after its end.")


def _read_header(stream: BinaryIO) -> tuple[str, int] | None:
    """Name and size of the next file; None at the end. A link, a folder, a device or an extension is refused."""
    block = _read_exactly(stream, _BLOCK)
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise UserError("not a packed run, or damaged: a header of it is none of a tar file.") from error
    if info.type != tarfile.REGTYPE or info.size < 0:
        raise UserError(f"{quote(one_line(info.name, 200))} is not a plain file: a packed run has no links or folders.")
    return info.name, info.size


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = stream.read(size - len(content))
        if not piece:
            raise _EndsEarly("it ends early")
        content += piece
    return content


def _skip_padding(stream: BinaryIO, size: int) -> None:
    if any(_read_exactly(stream, -size % _BLOCK)):
        raise UserError("bytes lie between its files.")


def refuse_full_disk(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an archive whose files would not fit, whatever size the archive itself has."""
    size, free = sum(int(one["bytes"]) for one in files.values()), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"its files take {decimal_bytes(size)}, and {folder} has {decimal_bytes(free)} left.")
