"""Sources: what a recipe names under `data.train` and `data.eval` -> blocks of raw rows, and their format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lorakit.atomic_io import sha256_of
from lorakit.data.documents import refuse_wrong_documents
from lorakit.data.formats import (
    columns_read,
    detect,
    is_readable,
    preference_pairs,
    refuse_preference_data,
    rejection_flags,
    required_columns,
)
from lorakit.data.readers import files_in, read_blocks
from lorakit.data.rows import Block, Row, normalize_line_ends
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.recipe.paths import is_path
from lorakit.recipe.problem import one_line, show_path
from lorakit.recipe.schema import Data, Source
from lorakit.registry import FORMATS

# Readable rows from which a source's format is told: a column that is null in the first row may not be in the next, and
# rows of two formats in one file must not be taken for one.
_HEAD = 1000
# Rows on which another reading of a source is tried.
_TRIED = 20
# Rows of a hub dataset in one block.
_HUB_ROWS = 1000


@dataclass
class OpenSource:
    """A source whose format is known. `size` is the bytes that its blocks stand for, together; 0 when not known.

    `format` is None where no row is readable. `files`: the names of its files. `unused`: the columns not read.
    """

    source: Source
    format: str | None
    settings: Any
    why: str
    blocks: Iterator[Block]
    size: int
    files: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    flags: dict[str, bool] = field(default_factory=dict)
    """The columns that may say that an answer should not be given, and what they say then."""
    seen: set[str] = field(default_factory=set)
    """The columns of the first rows."""

    def add_unused_columns(self, filled: set[str]) -> None:
        """Name the columns that hold something and that the format does not read."""
        mapping = self.source.columns or {}
        read = columns_read(self.format) if self.format else set()
        taken = set(mapping.values())
        late = {name for name in filled - taken if name not in read or name in mapping} - self.unused
        if self.format and late:
            self.unused |= late
            self.why = f"{self.why.partition('; not used: ')[0]}; not used: {', '.join(map(repr, sorted(self.unused)))}"

    def refuse_late_preference_pairs(self, filled: set[str]) -> None:
        """Refuse preference pairs that stand behind the rows from which the format was told.

        Raises:
            UserError: there are such rows.
        """
        for better, worse in preference_pairs(filled):
            if worse not in self.seen and better not in (self.source.columns or {}).values():
                raise UserError(
                    f"{source_name(self.source)}: some rows are preference pairs ({better!r} and {worse!r}, as for "
                    "DPO), of which one side should not be said. Take them out, or give them as a source of their own."
                )

    def refuse_missing(self, seen: set[str]) -> None:
        """Refuse a mapping to a column that no row of the source has.

        Raises:
            UserError: there is one.
        """
        if seen:
            _refuse_missing(self.source, seen, set(self.source.columns or {}))


def sources_of(section: Data, written: Any) -> list[Source]:
    """`data.train` or `data.eval` as a list of sources with every default filled in."""
    items = written if isinstance(written, list) else [written]
    sources = [Source(path=item) if isinstance(item, str) else item for item in items]
    return [
        source.model_copy(
            update={
                "format": source.format or section.format,
                "columns": section.columns if source.columns is None else source.columns,
                "system": section.system if source.system is None else source.system,
            }
        )
        for source in sources
    ]


def all_sources(section: Data) -> list[Source]:
    """Every source that a recipe names, the held-out ones last."""
    held_out = [] if section.eval is None or isinstance(section.eval, float) else sources_of(section, section.eval)
    return [*sources_of(section, section.train), *held_out]


def is_file(source: Source) -> bool:
    """Whether a source is a path on disk; the recipe reader has made every path absolute."""
    return is_path(source.path)


def source_name(source: Source) -> str:
    """A source as messages name it."""
    return show_path(Path(source.path)) if is_file(source) else f"{source.path}[{source.split}]"


def source_hashes(source: Source) -> dict[str, str]:
    """What a source holds: each file's sha256 by its path, or a hub dataset's fingerprint by its id and split.

    Raises:
        UserError: it cannot be read.
    """
    if not is_file(source):
        return {source_name(source): str(load_hub_dataset(source)._fingerprint)}
    contents = {}
    for path in files_in(Path(source.path)):
        try:
            contents[str(path)] = sha256_of(path)
        except OSError as error:
            raise UserError(f"{show_path(path)}: cannot be read: {error.strerror or error}.") from error
    return contents


def open_source(source: Source) -> OpenSource:
    """A source with its format, told from its first rows where the recipe does not say.

    Raises:
        UserError: the source cannot be read, its format cannot be told, or `columns` names a column that it has not.
    """
    blocks, size, files = _blocks(source)
    head, records, raw, seen = [], list[dict[str, Any]](), list[dict[str, Any]](), set[str]()
    for block in blocks:
        head.append(block)
        for row in block.rows():
            if isinstance(row.record, dict) and len(records) < _HEAD:
                seen.update(row.record)
                raw.append(row.record)
                records.append(rename_columns(row.record, source.columns or {}))
        if len(records) >= _HEAD:
            break
    blocks = chain(head, blocks)
    if not records:
        return OpenSource(source, None, None, "no readable row", blocks, size, files)
    given = None if source.format in (None, "auto") else entry_name(source.format)
    _refuse_missing(source, seen, _needed(given))
    _refuse_judged(source, given, raw, records)
    if given:
        name, why = given, "as the recipe says"
    else:
        refuse_wrong_documents(source_name(source), head, files)
        name, why = detect(records, source_name(source))
    read = columns_read(name)
    strange = sorted((source.columns or {}).keys() - read)
    if strange:
        raise UserError(
            f"{source_name(source)}: data.columns fills {strange[0]!r}, which the format {name} does not read. It "
            f"reads {', '.join(sorted(read))}."
        )
    filled = {column for record in records for column, value in record.items() if value is not None}
    unused = filled - read
    why = f"{why}; not used: {', '.join(map(repr, sorted(unused)))}" if unused else why
    settings = entry_settings(FORMATS, source.format)
    flags = rejection_flags(records, read) if FORMATS[name].conversations else {}
    return OpenSource(source, name, settings, why, blocks, size, files, unused, flags, seen)


def _refuse_judged(source: Source, given: str | None, raw: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """Refuse rows that say what should not be said.

    Raises:
        UserError: they are such rows.
    """
    columns = source.columns or {}

    def reads(tried: Mapping[str, str], our: str) -> bool:
        settings = entry_settings(FORMATS, source.format) if given else None
        return is_readable(given, settings, [rename_columns(record, tried) for record in raw[:_TRIED]], our)

    refuse_preference_data(source_name(source), records, columns, reads)


def _needed(format_name: str | None) -> set[str]:
    """The columns without which no row is of this format, or of any where it is to be told."""
    entries = [FORMATS[format_name]] if format_name else list(FORMATS)
    return {column for entry in entries for columns in required_columns(entry) for column in columns}


def _refuse_missing(source: Source, seen: set[str], ours: set[str]) -> None:
    """Refuse a mapping to a column that no row has. `ours` are the fields that are looked at."""
    for our, their in (source.columns or {}).items():
        if our in ours and their not in seen:
            near = nearest(their, sorted(seen))
            columns = one_line(", ".join(sorted(seen)), 200)
            raise UserError(
                f"{source_name(source)}: data.columns takes {our!r} from {their!r}, a column that no row has. "
                + (f"Did you mean {near!r}?" if near else f"The columns are {columns}.")
            )


def rename_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with `columns` (ours -> theirs) applied: what it fills has no other value, what it takes no other
    name."""
    if not columns:
        return record
    moved = {*columns, *columns.values()}
    kept = {column: value for column, value in record.items() if column not in moved}
    return {**kept, **{our: record[their] for our, their in columns.items() if their in record}}


def _blocks(source: Source) -> tuple[Iterator[Block], int, list[str]]:
    """A source's blocks, the bytes that they stand for together, and the names of its files."""
    if not is_file(source):
        dataset = load_hub_dataset(source)
        return _hub_blocks(source_name(source), dataset), 0, []
    files = files_in(Path(source.path))
    blocks = chain.from_iterable(map(read_blocks, files))
    return blocks, sum(path.stat().st_size for path in files), [show_path(path) for path in files]


def _hub_blocks(name: str, dataset: Any) -> Iterator[Block]:
    for start in range(0, len(dataset), _HUB_ROWS):
        rows = dataset[start : start + _HUB_ROWS]
        yield Block(name, start + 1, rows, _hub_rows, 0)


def _hub_rows(name: str, first: int, columns: dict[str, list[Any]]) -> Iterator[Row]:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
        yield Row(f"{name} row {number}", normalize_line_ends(dict(zip(columns, values, strict=True))))


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
            f"{source.path}: not a file on disk, and no hub dataset of this name could be loaded: {reason}. "
            "Write a path such as ./train.jsonl, or check the id, its split and the network."
        ) from error
