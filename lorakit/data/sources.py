"""Sources: files and hub datasets -> raw rows, each with the place it came from."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.formats import RowError
from lorakit.errors import UserError
from lorakit.recipe.schema import Data, Source


@dataclass(frozen=True)
class Row:
    """One raw record, or why it could not be read, and where it stands."""

    where: str
    record: dict[str, Any] | RowError


def sources_of(section: Data, written: Any) -> list[Source]:
    """`data.train` or `data.eval` as a list of sources with every default filled in."""
    items = written if isinstance(written, list) else [written]
    sources = [Source(path=item) if isinstance(item, str) else item for item in items]
    return [
        source.model_copy(
            update={
                "format": source.format or section.format,
                "columns": section.columns if source.columns is None else source.columns,
            }
        )
        for source in sources
    ]


def is_file(source: Source) -> bool:
    """Whether a source is a path on disk; the recipe reader has made every path absolute."""
    return Path(source.path).is_absolute()


def read_rows(source: Source) -> Iterator[Row]:
    """Every row of one source, in its order, with `columns` applied.

    Raises:
        UserError: the source as a whole cannot be read.
    """
    rows = _file_rows(Path(source.path)) if is_file(source) else _hub_rows(source)
    theirs = {column: ours for ours, column in (source.columns or {}).items()}
    for row in rows:
        if theirs and isinstance(row.record, dict):
            yield Row(row.where, {theirs.get(key, key): value for key, value in row.record.items()})
        else:
            yield row


def _file_rows(path: Path) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: rows are read from {', '.join(_READERS)} files, not {path.suffix or 'this'}.")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _record(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError(f"the row is {type(value).__name__}, not an object with named columns")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"no valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"no readable JSON: {error}") from error


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield Row(where, _record(_parse_json(_decode(raw))))
            except RowError as error:
                yield Row(where, error)


def _json(path: Path) -> Iterator[Row]:
    try:
        value = _parse_json(_decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf")))
    except RowError as error:
        raise UserError(f"{path}: {error}. One object a line is JSON Lines: name that file .jsonl.") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: a .json file holds one list of objects, this one holds {type(value).__name__}.")
    for number, record in enumerate(value, start=1):
        yield Row(f"{path} row {number}", _record(record))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: no valid CSV: {error}.") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise UserError(f"{path}:{line}: two columns have the same name: {', '.join(header)}.")
        elif len(cells) != len(header):
            yield Row(f"{path}:{line}", RowError(f"{len(cells)} cells under {len(header)} columns"))
        else:
            yield Row(f"{path}:{line}", dict(zip(header, cells, strict=True)))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield Row(f"{path} row {number}", record)
    except ArrowException as error:
        raise UserError(f"{path}: no readable Parquet file: {error}.") from error


def _hub_rows(source: Source) -> Iterator[Row]:
    for number, record in enumerate(load_hub_dataset(source), start=1):
        yield Row(f"{source.path}[{source.split}] row {number}", dict(record))


def load_hub_dataset(source: Source) -> Any:
    """The `datasets.Dataset` of a hub id.

    Raises:
        UserError: it cannot be had, with the library's reason.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source.path}: this is no file on disk, and no hub dataset of this name can be had: {reason}. "
            "Write a path such as ./train.jsonl, or check the id, its split and the network."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
