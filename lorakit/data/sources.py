"""Sources: what a recipe names under `data.train` and `data.eval` -> blocks of raw rows, and their format."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from lorakit.atomic_io import sha256_of
from lorakit.data.formats import preference_data
from lorakit.data.formats.columns import (
    columns_named,
    columns_read,
    detect,
    is_readable,
    parse_record,
    required_columns,
)
from lorakit.data.formats.places import as_text, has_column, refuse_absent_columns
from lorakit.data.readers import files_in, read_blocks, reading
from lorakit.data.readers.text_stream import detect_rows_in_document
from lorakit.data.rows import Block, Row, RowContent, normalize_line_ends
from lorakit.errors import UserError
from lorakit.recipe.data_files import data_suffix
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import entry_name, entry_settings, is_split
from lorakit.recipe.paths import is_path
from lorakit.recipe.problem import one_line, show_path
from lorakit.recipe.schema import Data, Source
from lorakit.registry import FORMATS, NamedColumns

TASK = "task"
"""The column whose values are tags: reports and scores are broken down by it."""
_LONGEST_TAG = 60
# Readable rows from which a source's format is told (a column that is null in one row may not be in the next); rows on
# which another reading is tried; rows of a hub dataset in one block.
_FIRST_ROWS, _TRIED_ROWS, _HUB_BLOCK = 1000, 20, 1000
AS_WRITTEN = "as the recipe says"
"""How the reason for a format begins where the recipe names it."""


@dataclass
class OpenSource:
    """A source whose format is known (None where no row is readable), and what has been seen of it. `size`: the bytes
    of all its blocks, 0 when not known; `files`: the names of its files; `unused`: the columns not read; `flags`: the
    columns that may reject an answer, and their value then; `seen`: the columns of the first rows. Of all blocks that
    were counted: `rows_in` each file, `columns`, and those of them that are `filled` in some row."""

    source: Source
    format: str | None
    settings: Any
    why: str
    blocks: Iterator[Block]
    size: int
    files: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    flags: dict[str, bool] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    rows_in: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)

    def without_blocks(self) -> "OpenSource":
        """What another process needs to read rows of it."""
        return replace(self, blocks=iter(()))

    def parse(self, record: dict[str, Any]) -> RowContent:
        """What a record says; a `RowError` where it says nothing that could be trained."""
        renamed = rename_columns(record, self.source.columns or {})
        preference_data.refuse_rejected_answer(renamed, self.flags)
        return parse_record(str(self.format), self.settings, renamed)

    def tag(self, record: Mapping[str, Any]) -> str:
        """The tag of a row: what its column `task` says, where that is a word or a few; else that of its source."""
        columns = self.source.columns or {}
        value = None if TASK in columns.values() and TASK not in columns else record.get(columns.get(TASK, TASK))
        return tag_of(value) or self.source.task or ""

    def count_block(self, file: str, rows: int, columns: set[str], filled: set[str]) -> None:
        self.rows_in[file] += rows
        self.columns |= columns
        self.filled |= filled

    def check_all_rows(self) -> None:
        """Refuse what only all rows show: a source without any, a mapped column that no row has, and preference pairs
        after the first rows; and tell of columns that hold something and are not used, and of files without a row."""
        name, mapping = source_name(self.source), self.source.columns or {}
        if not self.rows_in.total():
            raise UserError(f"{name}: no rows. A source needs at least one.")
        named = columns_named(self.format, self.settings).answers if self.format else frozenset[str]()
        for better, worse in preference_data.preference_pairs(self.filled):
            if worse not in self.seen and better not in {*mapping.values(), *named}:
                what = f"some rows are preference pairs ({better!r} and {worse!r}, as for DPO)"
                raise UserError(f"{name}: {what}. Take them out, or give them as a source of their own.")
        if self.columns:
            _refuse_missing(self.source, self.columns, set(mapping))
        if self.format:
            read = columns_read(self.format, self.settings) | (set() if TASK in self.unused else {TASK})
            unread = self.filled - (read - mapping.keys()) - set(mapping.values())
            if columns_named(self.format, self.settings).every:
                unread = set()
            if unread - self.unused:
                self.unused |= unread
                self.why = self.why.partition("; not used: ")[0] + _not_used(self.unused)
        if empty := [file for file in self.files if not self.rows_in[file]]:
            self.why += f"; no rows in {one_line(', '.join(empty), 300)}"


def sources_of(section: Data, written: Any) -> list[Source]:
    """`data.train` or `data.eval` as a list of sources with every default filled in."""
    items = written if isinstance(written, list) else [written]
    sources = [Source(path=item) if isinstance(item, str) else item for item in items]
    defaults = {name: getattr(section, name) for name in ("format", "columns", "system")}
    missing = [{name for name in defaults if getattr(source, name) is None} for source in sources]
    pairs = zip(sources, missing, strict=True)
    return [source.model_copy(update={name: defaults[name] for name in names}) for source, names in pairs]


def all_sources(section: Data) -> list[Source]:
    """Every source that a recipe names, the held-out ones last."""
    held_out = [] if section.eval is None or is_split(section.eval) else sources_of(section, section.eval)
    return [*sources_of(section, section.train), *held_out]


def is_file(source: Source) -> bool:
    """Whether a source is a path on disk; the recipe reader has made every path absolute."""
    return is_path(source.path)


def source_name(source: Source) -> str:
    if is_file(source):
        return show_path(Path(source.path))
    files = source.data_files if isinstance(source.data_files, list) else [source.data_files]
    return f"{source.path}[{', '.join(filter(None, (source.subset, *files, source.split)))}]"


def source_hashes(source: Source) -> dict[str, str]:
    """What a source holds: each file's sha256 by its path, or a hub dataset's fingerprint by its id and split."""
    if not is_file(source):
        return {source_name(source): str(load_hub_dataset(source)._fingerprint)}
    contents = {}
    for path in files_in(Path(source.path)):
        with reading(path):
            contents[str(path)] = sha256_of(path)
    return contents


def hub_commits(section: Data) -> dict[str, str | None]:
    """The commit of each hub dataset that a recipe names, as the library's cache knows it, by its id and split."""
    return {source_name(one): _commit(load_hub_dataset(one)) for one in all_sources(section) if not is_file(one)}


def _commit(dataset: Any) -> str | None:
    """The library keeps a hub dataset in a folder that is named after its commit (datasets/builder.py)."""
    folders = (Path(file["filename"]).parent.name for file in dataset.cache_files)
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def open_source(source: Source) -> OpenSource:
    """A source with its format, told from its first rows where the recipe does not name it. A `UserError` where it
    cannot be read or told, or `columns` names a column that the source does not have."""
    blocks, size, files = _blocks(source)
    columns, name = source.columns or {}, source_name(source)
    first_blocks, raw = [], list[dict[str, Any]]()
    for block in blocks:
        first_blocks.append(block)
        raw += [row.record for row in block.rows() if isinstance(row.record, dict)]
        if len(raw) >= _FIRST_ROWS:
            break
    blocks, raw = chain(first_blocks, blocks), raw[:_FIRST_ROWS]
    if not raw:
        return OpenSource(source, None, None, "no readable row", blocks, size, files)
    records = [rename_columns(record, columns) for record in raw]
    seen = {column for record in raw for column in record}
    given = None if source.format in (None, "auto") else entry_name(source.format)
    entries = [FORMATS[given]] if given else list(FORMATS)
    settings = entry_settings(FORMATS, source.format) if given else None
    named = columns_named(given, settings) if given else NamedColumns()
    required = {our for entry in entries for names in required_columns(entry) for our in names}
    _refuse_missing(source, seen, required | named.needed | named.optional)

    def can_read(tried: Mapping[str, str], our: str) -> bool:
        return is_readable(given, settings, [rename_columns(record, tried) for record in raw[:_TRIED_ROWS]], our)

    if given:
        refuse_absent_columns(name, named, records, columns_read(given, settings))
        can_read(columns, "")  # a Jinja text that never ends is stopped here, before many rows share a bound
    answers = {column: column for column in named.answers} | dict(columns)
    preference_data.refuse_preference_data(name, records, answers, can_read)
    if given:
        format_name, why = given, AS_WRITTEN + _absent(named, records)
    else:
        _refuse_wrong_documents(name, first_blocks, files)
        format_name, why = detect(records, name)
    read = _columns_used(format_name, settings, records)
    unread = sorted(columns.keys() - read)
    if unread:
        what = f"data.columns fills {unread[0]!r}, which the format {format_name} does not read"
        raise UserError(f"{name}: {what}. It reads {', '.join(sorted(read))}.")
    unused = {column for record in records for column, value in record.items() if value is not None} - read
    why += _not_used(unused)
    flags = preference_data.rejection_flags(records, read) if FORMATS[format_name].conversations else {}
    return OpenSource(source, format_name, settings, why, blocks, size, files, unused, flags, seen)


def _columns_used(format_name: str, settings: Any, records: list[dict[str, Any]]) -> set[str]:
    """The columns that a format reads, that of tags, and all where a program may read all."""
    used = columns_read(format_name, settings)
    if columns_named(format_name, settings).every:
        used |= {column for record in records for column in record}
    return used | {TASK} if any(tag_of(record.get(TASK)) for record in records) else used


def _absent(named: NamedColumns, records: list[dict[str, Any]]) -> str:
    """Which columns that the recipe's texts do without are not there."""
    lacking = [name for name in sorted(named.optional) if not has_column(records, name)]
    return f"; no row has {', '.join(map(repr, lacking))}" if lacking else ""


def tag_of(value: Any) -> str:
    """A value as a tag; empty for what is none: nothing, a long text, an object."""
    text = as_text(value, "a tag").strip() if isinstance(value, str | int) else ""
    return text if len(text) <= _LONGEST_TAG and text.isprintable() else ""


def _not_used(columns: set[str]) -> str:
    return f"; not used: {', '.join(map(repr, sorted(columns)))}" if columns else ""


def _refuse_wrong_documents(source: str, head: list[Block], files: list[str]) -> None:
    """Refuse to train on rows as if they were documents, and on documents that only lie beside rows."""
    documents = [file for file in files if data_suffix(file).startswith((".txt", ".md"))]
    others = [file for file in files if file not in documents]
    columns = frozenset(chain.from_iterable(columns_read(entry.name) for entry in FORMATS))
    for block in head if documents else ():
        record = next((row.record for row in block.rows() if isinstance(row.record, dict)), None)
        if record is None:
            continue
        kind = detect_rows_in_document(str(record["text"]), columns) if block.name in documents else None
        if kind:
            example = PurePath(block.name).name.partition(".")[0] + kind[1]
            remedy = (
                f"Give it a name that ends in {kind[1]}, such as {example}, or write data.format: text to train on it"
            )
            raise UserError(f"{block.name}: the file seems to hold {kind[0]}, not a document. {remedy} as it stands.")
        if block.name in others and "text" not in record:
            texts, rows = (one_line(", ".join(names), 200) for names in (documents, others))
            kinds = ", ".join(sorted({f"'{source}/*{data_suffix(file)}'" for file in others}))
            what = f"text documents ({texts}) lie beside files of rows ({rows})"
            raise UserError(f"{source}: {what}. Name the files to train on by a pattern, such as {kinds}.")


def _refuse_missing(source: Source, seen: set[str], ours: set[str]) -> None:
    """Refuse a mapping, for one of our columns `ours`, to a column that no row has."""
    for our, their in (source.columns or {}).items():
        if our in ours and their not in seen:
            near = nearest(their, sorted(seen))
            remedy = f"Did you mean {near!r}?" if near else f"The columns are {one_line(', '.join(sorted(seen)), 200)}."
            what = f"data.columns takes {our!r} from {their!r}, a column that no row has"
            raise UserError(f"{source_name(source)}: {what}. {remedy}")


def rename_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with `columns` (ours -> theirs) applied; their names, and other values under ours, are gone."""
    if not columns:
        return record
    moved = {*columns, *columns.values()}
    others = {column: value for column, value in record.items() if column not in moved}
    return {**others, **{our: record[their] for our, their in columns.items() if their in record}}


def _blocks(source: Source) -> tuple[Iterator[Block], int, list[str]]:
    """A source's blocks, the bytes of all of them, and the names of its files."""
    if is_file(source):
        files = files_in(Path(source.path))
        blocks = chain.from_iterable(map(read_blocks, files))
        return blocks, sum(path.stat().st_size for path in files), [show_path(path) for path in files]
    name, dataset = source_name(source), load_hub_dataset(source)
    starts = range(0, len(dataset), _HUB_BLOCK)
    return (Block(name, start + 1, dataset[start : start + _HUB_BLOCK], _hub_rows, 0) for start in starts), 0, []


def _hub_rows(name: str, first: int, columns: dict[str, list[Any]]) -> Iterator[Row]:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
        yield Row(f"{name} row {number}", normalize_line_ends(dict(zip(columns, values, strict=True))))


def load_hub_dataset(source: Source) -> Any:
    """The `datasets.Dataset` of a hub id; a `UserError` with the library's reason where it could not be loaded."""
    import datasets

    place = {"split": source.split, "revision": source.revision, "data_files": source.data_files}
    try:
        return datasets.load_dataset(source.path, source.subset, **place)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"not a file on disk, and no hub dataset of this name could be loaded: {reason}"
        remedy = "Write a path such as ./train.jsonl, or check the id, its split and the network."
        raise UserError(f"{source.path}: {what}. {remedy}") from error
