"""Which format rows have, and what a record holds in a format."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from lorakit.data.conversations import RowContent
from lorakit.data.formats.columns import is_empty
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.recipe.data_files import data_suffix
from lorakit.recipe.fields import entry_settings
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS, FormatSpec, Section

# The columns of OpenAssistant's flat files, which the format text fits and would read wrongly.
_FLAT_OASST = {"message_id", "role", "text"}


def required_columns(entry: FormatSpec) -> list[tuple[str, ...]]:
    """The columns that a row of this format must have; of several in one tuple it has one."""
    return [(column,) if isinstance(column, str) else tuple(column) for column in entry.columns]


def columns_read(name: str) -> set[str]:
    """Every column that a format reads."""
    entry = FORMATS[name]
    return {*chain.from_iterable(required_columns(entry)), *entry.optional}


def parse_record(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowContent:
    """The content of a record in a format; a `RowError` where it has none. `settings`: None for the defaults."""
    entry = FORMATS[name]
    settings = entry_settings(FORMATS, name) if settings is None else settings
    try:
        content: RowContent = entry.function(record) if settings is None else entry.function(record, settings)
        return content
    except RecursionError as error:
        raise RowError("the row is nested too deeply") from error


def detect(records: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
    """The format that these rows have, and why. `where` names their source in messages.

    A format fits when its columns hold something in some row. One that asks for all columns of another and for more
    goes before it. Formats that can read none of the rows drop out where others can. A `UserError` where no format
    fits, or several do.
    """
    columns, fitting = _fitting_formats(records)
    if columns >= _FLAT_OASST:
        raise UserError(
            f"{where}: each row is one message (message_id, role, text) without those before it, as in OpenAssistant's "
            "flat files. Take the file of trees (.trees.jsonl.gz), or write format: text to train on single messages."
        )
    fitting = [entry for entry in fitting if not _has_longer_variant(entry, fitting)]
    readable = [entry for entry in fitting if any(_complaint(entry.name, None, record) is None for record in records)]
    # Where a format's own columns are there and no row is right, each row's error tells best what is wrong with it.
    chosen = readable or [entry for entry in fitting if len(fitting) == 1 and not _has_longer_variant(entry, FORMATS)]
    shown_columns = one_line(", ".join(sorted(columns)), 200) or "none"
    if len(chosen) == 1:
        present = (next(name for name in names if name in columns) for names in required_columns(chosen[0]))
        return chosen[0].name, f"rows have {' and '.join(map(repr, present))}"
    if chosen:
        names = ", ".join(entry.name for entry in chosen)
        raise UserError(
            f"{where}: the columns ({shown_columns}) fit several formats: {names}. Write one of them in data.format."
        )
    as_one = (f"As {entry.name}: {one_line(str(_complaint(entry.name, None, records[0])), 200)}. " for entry in fitting)
    needs = (f"{entry.name} needs {', '.join(map(' or '.join, required_columns(entry)))}" for entry in FORMATS)
    raise UserError(
        f"{where}: no format fits the columns ({shown_columns}). {_hint(records, where)}{''.join(as_one)}"
        f"{'; '.join(needs)}. Map other names with data.columns, for example columns: {{prompt: question, completion: "
        "answer}."
    )


def is_readable(name: str | None, settings: Section | None, records: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a format (the detected one where `name` is None) reads one of these records, and `column` if not ""."""
    try:
        format_name = name or detect(records, "")[0]
    except UserError:
        return False
    reads_column = not column or column in columns_read(format_name)
    return reads_column and any(_complaint(format_name, settings, record) is None for record in records)


def _fitting_formats(records: Sequence[Mapping[str, Any]]) -> tuple[set[str], list[FormatSpec]]:
    """The columns that hold something, and the formats that they fit.

    Where they fit none, a column that holds nothing but empty texts and lists counts too: it tells what the rows are.
    """
    filled = {column for record in records for column, value in record.items() if not is_empty(value)}
    present = {column for record in records for column, value in record.items() if value is not None}
    for columns in (filled, present):
        fitting = [one for one in FORMATS if not any(columns.isdisjoint(names) for names in required_columns(one))]
        if fitting:
            return columns, fitting
    return present, []


def _has_longer_variant(entry: FormatSpec, entries: Iterable[FormatSpec]) -> bool:
    """Whether another of these formats asks for all columns of `entry` and for more."""
    return any(set(required_columns(other)) > set(required_columns(entry)) for other in entries)


def _complaint(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowError | None:
    """Why a record is not of this format; None where it is."""
    try:
        parse_record(name, settings, record)
    except RowError as error:
        return error
    return None


def _hint(records: Sequence[Mapping[str, Any]], where: str) -> str:
    """What the file seems to hold in place of rows."""
    lists = [column for column, value in records[0].items() if isinstance(value, list) and value]
    if len(records) == 1 and (rows := [column for column in lists if isinstance(records[0][column][0], Mapping)]):
        return f"The rows seem to be under {rows[0]!r}: give a file of that list alone. "
    is_table = data_suffix(where).startswith((".csv", ".tsv"))
    return "The first line names the columns: put such a line above the rows where there is none. " if is_table else ""
