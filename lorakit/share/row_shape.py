"""What a recipe has to say of rows that it has never seen: their format, their columns, how many to hold out. What only
a person can know, such as which of several columns is the answer, is guessed, and called a guess."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.amounts import counted
from lorakit.data.formats.columns import detect, is_empty, is_readable, required_columns
from lorakit.data.formats.preference_data import refuse_preference_data
from lorakit.data.readers import files_in, read_file
from lorakit.data.rows import Conversation, RowContent, RowError, up_to_last_answer
from lorakit.data.sources import AS_WRITTEN, open_source, rename_columns
from lorakit.errors import UserError
from lorakit.plan.row_sample import SourceSample, sample_source
from lorakit.recipe.problem import one_line, show_path
from lorakit.recipe.schema import Data, Source
from lorakit.registry import FORMATS
from lorakit.share.template_guess import guess_template

_FIRST_ROWS, _TRIED_ROWS, _PARSED_ROWS = 1000, 20, 2000
# Held-out rows: none below the first number, then these shares; of more rows than the last, so many rows.
_SHARES, _MOST_HELD_OUT = ((30, None), (100, 0.2), (5000, 0.1)), 500
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class RowShape:
    """What was seen of a source: `rows` it has (`exact` or estimated), the values of `data.format`, `data.columns`,
    `data.eval` and `data.broken` that fit, why, and what a person has to look at. `calls_tools`: whether some of them
    end with a call."""

    rows: int
    exact: bool
    format: Any
    columns: dict[str, str]
    eval: float | None
    broken: str
    why: str
    conversations: bool
    calls_tools: bool
    notes: list[str] = field(default_factory=list)


def look_at_rows(path: Path) -> RowShape:
    """The shape of the rows in a file, a folder or a pattern.

    Raises:
        UserError: nothing there can be read, or no column could be an answer to another.
    """
    source, notes = _fitting_source(path)
    sample = sample_source(source)
    contents, broken, note = _parse(sample, show_path(path))
    total = round(sample.total)
    different = round(total * len({repr(row.record) for row in sample.rows}) / max(len(sample.rows), 1))
    share = held_out_share(different)  # copies of a row stay on one side
    notes = [*notes, *([note] if note else [])]
    if share is None:
        few = f"no rows are held out, since too few are different ({different:,} of {total:,})"
        notes.append(f"data.eval: {few}. Name a file of other rows there to have scores.")
    name = str(sample.opened.format)
    return RowShape(
        rows=total,
        exact=sample.counted,
        format="auto" if source.format == "auto" else _plain(source.format),
        columns=source.columns or {},
        eval=share,
        broken="drop" if broken else "error",
        why=f"{name}: {sample.opened.why.replace(AS_WRITTEN, 'a guess')}",
        conversations=FORMATS[name].conversations,
        calls_tools=any(map(_ends_with_a_call, contents)),
        notes=notes,
    )


def _plain(written: Any) -> Any:
    return written if isinstance(written, str) else written.model_dump(exclude_defaults=True)


def held_out_share(rows: int) -> float | None:
    """The fraction of so many rows to hold out: enough to tell models apart, and no more."""
    for below, share in _SHARES:
        if rows < below:
            return share
    return max(round(_MOST_HELD_OUT / rows, 2), _LEAST_SHARE)


def _fitting_source(path: Path) -> tuple[Source, list[str]]:
    """The source with the format and the columns with which its rows can be read, and what is to be said of them."""
    source = _source(path)
    try:
        open_source(source)
        return source, []
    except UserError as error:
        records = _first_records(path)
        if not records:
            raise
        try:
            return _unnamed_source(path, records, error)
        except UserError as refusal:
            hint = (
                "Without --data, lorakit new starts a recipe into which data.train, format and columns can be written"
            )
            raise UserError(f"{refusal} {hint}.") from refusal


def _unnamed_source(path: Path, records: Sequence[dict[str, Any]], error: UserError) -> tuple[Source, list[str]]:
    """As `_fitting_source`, for rows whose format cannot be told from the names of their columns; else the `error`."""
    if not _lacks_a_format(records, path):
        raise error
    if name := _one_of_several(records):
        what = f"the columns fit several formats, of which {name} has whole answers"
        return _source(path, name), [f"data.format is a guess, since {what}. Look at lorakit data."]
    fitting = list(_columns_that_fit(records, path))
    columns = next((columns for columns, conversations in fitting if conversations), None)
    guess = None if columns else guess_template(records)
    if guess is None:
        columns = columns or next((columns for columns, _ in fitting), None)
        if columns is None:
            raise error
        shown = ", ".join(f"{our!r} is their {their!r}" for our, their in columns.items())
        return _source(path, columns=columns), [f"data.columns: {one_line(shown, 200)}."]
    guessed = _source(path, {"template": guess.settings}, guess.columns)
    open_source(guessed)
    why = "the names of the columns do not tell what the rows are"
    return guessed, [f"data.format is a guess, since {why}. {guess.why}"]


def _source(path: Path, written: Any = "auto", columns: Mapping[str, str] | None = None) -> Source:
    return Source.model_validate({"path": str(path), "format": written, "columns": dict(columns or {})})


def _first_records(path: Path) -> list[dict[str, Any]]:
    rows = (row for file in files_in(path) for row in read_file(file))
    return [row.record for row in islice(rows, _FIRST_ROWS) if isinstance(row.record, dict)]


def _lacks_a_format(records: Sequence[dict[str, Any]], path: Path) -> bool:
    """Whether nothing is wrong with these rows but their columns' names; a `UserError` for preference data."""

    def can_read(tried: Mapping[str, str], our: str) -> bool:
        return is_readable(None, None, [rename_columns(record, tried) for record in records[:_TRIED_ROWS]], our)

    refuse_preference_data(show_path(path), records, {}, can_read)
    try:
        detect(records, show_path(path))
    except UserError:
        return True
    return False


def _one_of_several(records: Sequence[dict[str, Any]]) -> str | None:
    """The first format of conversations that reads these rows, which no format fits alone: where a column holds the
    rendered text besides, as in Alpaca's files, it is not the rows."""
    filled = {name for record in records for name, value in record.items() if not is_empty(value)}
    entries = [entry for entry in FORMATS if entry.columns and entry.conversations]
    fitting = [one.name for one in entries if not any(filled.isdisjoint(names) for names in required_columns(one))]
    return next((name for name in fitting if is_readable(name, None, records[:_TRIED_ROWS], "")), None)


def _columns_that_fit(records: Sequence[dict[str, Any]], path: Path) -> Iterator[tuple[dict[str, str], bool]]:
    """Columns (ours -> theirs) with which a format reads the rows, and whether as conversations: lists of messages
    under another name, and names that differ from ours in letter case, spaces and the like."""
    names = dict.fromkeys(name for record in records for name in record)
    ours = {name for entry in FORMATS for names in entry.columns for name in _alternatives(names)}
    folded = {_fold(our): our for our in ours}
    spelled = {folded[_fold(name)]: name for name in names if _fold(name) in folded and name not in ours}
    lists = [name for name in names if any(isinstance(record.get(name), list) for record in records)]
    tried = [spelled, *({our: name} for our in ("messages", "conversations") for name in lists if name != our)]
    for columns in filter(None, tried):
        try:
            opened = open_source(_source(path, columns=columns))
        except UserError:  # these columns do not fit, others may
            continue
        if is_readable(opened.format, None, [rename_columns(one, columns) for one in records[:_TRIED_ROWS]], ""):
            yield columns, opened.format is not None and FORMATS[opened.format].conversations


def _alternatives(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _fold(name: str) -> str:
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


def _ends_with_a_call(content: RowContent) -> bool:
    """Whether the last answer of a row calls tools: the one that `lorakit eval` asks for."""
    last = up_to_last_answer(content)
    return isinstance(last, Conversation) and "tool_calls" in last.messages[-1]


def _parse(sample: SourceSample, name: str) -> tuple[list[RowContent], int, str]:
    """What the rows that are looked at say, how many of them cannot be trained on, and the first one's reason.

    Raises:
        UserError: none of them can.
    """
    rows, broken = sample.rows[:: max(len(sample.rows) // _PARSED_ROWS, 1)], list[str]()
    contents: list[RowContent] = []
    for row in rows:
        try:
            if isinstance(row.record, RowError):
                raise row.record
            contents.append(sample.opened.parse(row.record))
        except RowError as error:
            broken.append(f"{row.where}: {error}")
    if len(broken) == len(rows):
        what = f"none of {counted(len(rows), 'row')} can be trained on" if rows else "no rows"
        raise UserError(f"{name}: {what}{f'. {one_line(broken[0], 300)}' if broken else ''}.")
    if not broken:
        return contents, 0, ""
    what = f"{len(broken):,} of {counted(len(rows), 'row')} that were looked at cannot be trained on"
    return contents, len(broken), f"data.broken is drop: {what}, the first {one_line(broken[0], 200)}."


def read_section(shape: RowShape) -> dict[str, Any]:
    """The keys of a recipe's data section that say what the rows are, where they differ from the defaults."""
    values = {"format": shape.format, "columns": shape.columns, "broken": shape.broken}
    defaults = {name: Data.model_fields[name].get_default() for name in values}
    return {name: value for name, value in values.items() if value != defaults[name]} | {"eval": shape.eval}
