"""Sources: what a recipe names under `data.train` and `data.eval` -> raw rows under our column names."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lorakit.data.files import Row, read_file
from lorakit.data.formats import detect
from lorakit.errors import UserError
from lorakit.folders import sha256_of
from lorakit.recipe.nearest import nearest
from lorakit.recipe.problems import one_line, shown_path
from lorakit.recipe.schema import Data, Source
from lorakit.tables import FORMATS

# Readable rows from whose columns a source's format is told: a column that is null in the first row may not be in the
# next, and rows of two formats in one file must not be taken for one.
_HEAD = 1000


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


def shown(source: Source) -> str:
    """A source as messages name it."""
    return shown_path(Path(source.path)) if is_file(source) else f"{source.path}[{source.split}]"


def content_of(source: Source) -> str:
    """A name for what a source holds: a file's sha256, a hub dataset's fingerprint.

    Raises:
        UserError: it cannot be read.
    """
    if not is_file(source):
        return str(load_hub_dataset(source)._fingerprint)
    path = Path(source.path)
    try:
        if not path.exists():
            raise UserError(f"{shown(source)}: there is no such file.")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{shown(source)}: this is {found}. Write the path of a data file.")
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{shown(source)}: cannot be read: {error.strerror or error}.") from error


def open_source(source: Source) -> tuple[str | None, str, Iterator[Row]]:
    """The format of a source (None when no row is readable), how it is known, and its rows under our column names.

    Raises:
        UserError: the source cannot be read, its format cannot be told, or `columns` names a column that it has not.
    """
    raw = read_file(Path(source.path)) if is_file(source) else _hub_rows(source)
    seen: set[str] = set()
    rows = _renamed(source, raw, seen)
    head, records = [], []
    for row in rows:
        head.append(row)
        if isinstance(row.record, dict):
            records.append(row.record)
        if len(records) == _HEAD:
            break
    rows = chain(head, rows)
    if not records:
        return None, "no readable row", rows
    given = None if source.format == "auto" else source.format
    _refuse_missing(source, seen, _needed(given))
    filled = {column for record in records for column, value in record.items() if value is not None}
    name, why = (given, "as the recipe says") if given else detect(filled, shown(source))
    read = {*FORMATS[name].facts["columns"], *FORMATS[name].facts.get("optional", ())}
    strange = sorted((source.columns or {}).keys() - read)
    if strange:
        raise UserError(
            f"{shown(source)}: data.columns fills {strange[0]!r}, which the format {name} does not read. It reads "
            f"{', '.join(sorted(read))}."
        )
    unused = ", ".join(map(repr, sorted(filled - read)))
    return name, f"{why}; not used: {unused}" if unused else why, rows


def _needed(format_name: str | None) -> set[str]:
    """The columns without which no row is of this format, or of any where it is to be told."""
    entries = [FORMATS[format_name]] if format_name else list(FORMATS)
    return {column for entry in entries for column in entry.facts["columns"]}


def _refuse_missing(source: Source, seen: set[str], ours: set[str]) -> None:
    """Refuse a mapping to a column that no row has. `ours` are the fields that are looked at."""
    for our, their in (source.columns or {}).items():
        if our in ours and their not in seen:
            near = nearest(their, sorted(seen))
            columns = one_line(", ".join(sorted(seen)), 200)
            raise UserError(
                f"{shown(source)}: data.columns takes {our!r} from {their!r}, a column that no row has. "
                + (f"Did you mean {near!r}?" if near else f"The columns are {columns}.")
            )


def _renamed(source: Source, rows: Iterator[Row], seen: set[str]) -> Iterator[Row]:
    """The rows with `columns` applied: what it fills has no other value, what it takes no other name.

    Their own names are added to `seen`.
    """
    mapping = source.columns or {}
    if not mapping:
        yield from rows
        return
    moved = {*mapping, *mapping.values()}
    for row in rows:
        if isinstance(row.record, dict):
            seen.update(row.record)
            kept = {column: value for column, value in row.record.items() if column not in moved}
            taken = {our: row.record[their] for our, their in mapping.items() if their in row.record}
            yield Row(row.where, {**kept, **taken})
        else:
            yield row
    if seen:
        _refuse_missing(source, seen, set(mapping))


def _hub_rows(source: Source) -> Iterator[Row]:
    for number, record in enumerate(load_hub_dataset(source), start=1):
        yield Row(f"{shown(source)} row {number}", dict(record))


def load_hub_dataset(source: Source) -> Any:
    """The `datasets.Dataset` of a hub id.

    Raises:
        UserError: it cannot be had, with the library's reason.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source.path}: this is no file on disk, and no hub dataset of this name can be had: {reason}. "
            "Write a path such as ./train.jsonl, or check the id, its split and the network."
        ) from error
