"""Which format rows have, told from the rows, and what a record says in a format."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lorakit.data.conversations import RowContent
from lorakit.data.formats.columns import is_empty
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.recipe.choice import entry_settings
from lorakit.recipe.data_files import data_suffix
from lorakit.recipe.problem import one_line
from lorakit.recipe.section import Section
from lorakit.registry import FORMATS, FormatSpec

# Rows that a format fits by its columns, and that it would read wrongly.
_ELSE = (
    (
        {"message_id", "role", "text"},
        "each row is one message (message_id, role, text) without those before it, as in OpenAssistant's flat files. "
        "Take the file of trees (.trees.jsonl.gz), or write format: text to train on single messages",
    ),
)


def required_columns(entry: FormatSpec) -> list[tuple[str, ...]]:
    """The columns that a row of this format must have; of several in one tuple it has one."""
    return [(column,) if isinstance(column, str) else tuple(column) for column in entry.columns]


def columns_read(name: str) -> set[str]:
    """Every column that a format reads."""
    entry = FORMATS[name]
    return {*chain.from_iterable(required_columns(entry)), *entry.optional}


def parse_record(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowContent:
    """What a record says in a format. `settings` None are the format's defaults, where it has settings.

    Raises:
        RowError: the record is not of this format.
    """
    entry = FORMATS[name]
    settings = entry_settings(FORMATS, name) if settings is None else settings
    try:
        found: RowContent = entry.function(record) if settings is None else entry.function(record, settings)
    except RecursionError as error:
        raise RowError("the row is nested too deeply") from error
    return found


def detect(records: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
    """The format that these rows have, and why. `where` names their source in messages.

    A format fits when its columns hold something in some row. One that asks for all columns of another and for more
    goes before it. Where several are left, those drop out that can read none of the rows.

    Raises:
        UserError: no format fits, or several do.
    """
    columns, fitting = _candidates(records)
    for strange, what in _ELSE:
        if strange <= columns:
            raise UserError(f"{where}: {what}.")
    fitting = [entry for entry in fitting if not any(_goes_before(other, entry) for other in fitting)]
    readable = [entry for entry in fitting if _reads_one(entry, records)]
    # Where a format's own columns are there and no row is right, each row says best what is wrong with it.
    chosen = readable or [entry for entry in fitting if len(fitting) == 1 and not _is_part_of_another(entry)]
    seen = one_line(", ".join(sorted(columns)), 200) or "none"
    if len(chosen) == 1:
        wanted = " and ".join(repr(_held(names, columns)) for names in required_columns(chosen[0]))
        return chosen[0].name, f"rows have {wanted}"
    if chosen:
        names = ", ".join(entry.name for entry in chosen)
        raise UserError(
            f"{where}: the columns ({seen}) fit several formats: {names}. Write one of them in data.format."
        )
    known = _known(fitting, columns, records)
    raise UserError(f"{where}: no format fits the columns ({seen}). {_shape(records, where)}{known}")


def is_readable(name: str | None, settings: Section | None, records: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a format, the one that is told where no `name` is given, reads one of these records, and `column` if it
    is not empty."""
    try:
        found = name or detect(records, "")[0]
        return (not column or column in columns_read(found)) and any(
            _complaint_of(found, settings if name else None, record) is None for record in records
        )
    except UserError:
        return False


def _candidates(records: Sequence[Mapping[str, Any]]) -> tuple[set[str], list[FormatSpec]]:
    """The columns that hold something, and the formats that they fit.

    Where they fit none, a column that holds nothing but empty texts and lists counts too: it says what the rows are.
    """
    filled = {column for record in records for column, value in record.items() if not is_empty(value)}
    there = {column for record in records for column, value in record.items() if value is not None}
    for columns in (filled, there):
        fitting = [entry for entry in FORMATS if _fits(entry, columns)]
        if fitting:
            return columns, fitting
    return there, []


def _fits(entry: FormatSpec, columns: set[str]) -> bool:
    return all(not columns.isdisjoint(names) for names in required_columns(entry))


def _goes_before(one: FormatSpec, other: FormatSpec) -> bool:
    return set(required_columns(one)) > set(required_columns(other))


def _is_part_of_another(entry: FormatSpec) -> bool:
    return any(_goes_before(other, entry) for other in FORMATS)


def _held(names: tuple[str, ...], columns: set[str]) -> str:
    return next(name for name in names if name in columns)


def _reads_one(entry: FormatSpec, records: Sequence[Mapping[str, Any]]) -> bool:
    return any(_complaint(entry, record) is None for record in records)


def _complaint(entry: FormatSpec, record: Mapping[str, Any]) -> RowError | None:
    """Why a record is not of this format; None where it is."""
    return _complaint_of(entry.name, None, record)


def _complaint_of(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowError | None:
    try:
        parse_record(name, settings, record)
    except RowError as error:
        return error
    return None


def _shape(records: Sequence[Mapping[str, Any]], where: str) -> str:
    """What the file seems to hold in place of rows."""
    lists = [column for column, value in records[0].items() if isinstance(value, list) and value]
    if len(records) == 1 and (rows := [column for column in lists if isinstance(records[0][column][0], Mapping)]):
        return f"The rows seem to lie under {rows[0]!r}: give a file of that list alone. "
    header = data_suffix(where).startswith((".csv", ".tsv"))
    return "The first line names the columns: put such a line above the rows where there is none. " if header else ""


def _known(fitting: list[FormatSpec], columns: set[str], records: Sequence[Mapping[str, Any]]) -> str:
    """What would fit, and why those do not that have their columns."""
    known = "; ".join(
        f"{entry.name} needs {', '.join(' or '.join(names) for names in required_columns(entry))}" for entry in FORMATS
    )
    complaints = [f"As {entry.name}: {one_line(str(_complaint(entry, records[0])), 200)}." for entry in fitting]
    example = "Map other names with data.columns, for example columns: {prompt: question, completion: answer}."
    return " ".join([*complaints, f"{known}.", example])
