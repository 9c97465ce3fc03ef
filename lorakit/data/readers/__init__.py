"""Readers: JSON Lines, JSON, CSV, TSV, Parquet, Arrow and text files -> raw rows, each with its place. A file is read
as blocks, so that memory does not grow with it and other processes can parse. A row that cannot be read is a `Row` that
says why; a file that cannot be read as a whole is a `UserError`."""

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lorakit.data.readers import delimited, json_rows
from lorakit.data.readers.arrow import read_columns
from lorakit.data.readers.text_stream import TextStream, read_documents, refuse_other_columns
from lorakit.data.rows import Block, Row
from lorakit.errors import UserError
from lorakit.recipe.data_files import COMPRESSIONS, KNOWN_SUFFIXES, TooManyFiles, data_files, data_suffix, is_pattern
from lorakit.recipe.problem import one_line, show_path

_TEXTS: dict[str, Callable[[TextStream], Iterator[Block]]] = {
    ".jsonl": json_rows.read_lines, ".ndjson": json_rows.read_lines, ".json": json_rows.read_values,
    ".csv": partial(delimited.read, delimiter=","), ".tsv": partial(delimited.read, delimiter="\t"),
    ".txt": read_documents, ".md": read_documents,
}  # fmt: skip
_COLUMNS = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes a `UserError` of what the system says of a file that cannot be read."""
    name = show_path(path)
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such file.") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {one_line(error.strerror or str(error), 200)}.") from error


def files_in(path: Path) -> list[Path]:
    """The data files that a path means, in order: the file itself, those below a folder, those a pattern matches. A
    `UserError` where there are none, one is not a regular file, or they cannot be listed."""
    name = show_path(path)
    with reading(path):
        try:
            is_set = is_pattern(path) or stat.S_ISDIR(path.stat().st_mode)
            files = sorted(data_files(path)) if is_set else [path]
        except TooManyFiles as error:
            raise UserError(f"{name}: {error.strerror}. Write the folder that holds the rows.") from error
    if not files:
        reason = "the pattern matches no data file" if is_pattern(path) else "the folder has no data files"
        raise UserError(f"{name}: {reason}. Their names end in {KNOWN_SUFFIXES}.")
    for file in files:
        _refuse_irregular_file(file)
    return files


def read_file(path: Path) -> Iterator[Row]:
    """Every row of a file, in its order. Raises as `read_blocks`."""
    for block in read_blocks(path):
        yield from block.rows()


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of a file as blocks of about 1 MiB, in their order. The sizes of all blocks add up to the file's. A
    `UserError` where the file as a whole cannot be read comes after what was readable before the fault."""
    name, suffix = show_path(path), data_suffix(path.name)
    if not suffix:
        ending = path.suffix or "this"
        raise UserError(f"{name}: rows are read from files whose names end in {KNOWN_SUFFIXES}; not from {ending}.")
    _refuse_irregular_file(path)
    with reading(path), path.open("rb") as file:
        if suffix in _COLUMNS:
            refuse_other_columns(name, suffix, file.read(4096))
            yield from read_columns(path, name, _COLUMNS[suffix])
        else:
            compression = next((ending for ending in COMPRESSIONS if suffix.endswith(ending)), "")
            content = suffix.removesuffix(compression)
            yield from _TEXTS[content](TextStream(name, file, compression, content))


def _refuse_irregular_file(path: Path) -> None:
    """Reading a pipe or a device might never end. What else is wrong with a file, its reader tells."""
    with suppress(OSError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{show_path(path)}: this is {what}. Write the path of a data file.")
