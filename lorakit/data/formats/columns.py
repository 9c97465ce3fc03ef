"""The columns of rows: which format they fit, and what several formats read from them (texts, tools, calls of these).
Parquet and Arrow store an object as a struct: every object of a column has the members of all, null where it has none.
Which nulls are such fillers is told from JSON Schema, where null is a value of `const`, and of a `default` where null
is allowed. In the arguments of a call, a null is a filler where the row's own tools say that the function takes no such
argument, or that it may be left out and may not be null. All other nulls stay: without a schema nobody can tell whether
they were meant."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from lorakit.data.rows import STRICT_JSON, Conversation, Message, RowContent, RowError, kind
from lorakit.errors import UserError
from lorakit.recipe.data_files import data_suffix
from lorakit.recipe.fields import entry_settings
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS, FormatSpec, NamedColumns, Section

# The columns of OpenAssistant's flat files, which the format text fits and would read wrongly.
_FLAT_OASST = {"message_id", "role", "text"}
# Keywords of JSON Schema that hold values and not schemas.
_SCHEMA_VALUES = ("const", "default", "enum", "examples", "example")


def required_columns(entry: FormatSpec) -> list[tuple[str, ...]]:
    """The columns that a row of this format must have; of several in one tuple it has one."""
    return [(column,) if isinstance(column, str) else tuple(column) for column in entry.columns]


def columns_named(name: str, settings: Section | None) -> NamedColumns:
    """The columns that the texts of a format's settings name; `settings`: None for the defaults."""
    entry = FORMATS[name]
    settings = entry_settings(FORMATS, name) if settings is None else settings
    return entry.named(settings) if entry.named else NamedColumns()


def columns_read(name: str, settings: Section | None = None) -> set[str]:
    """Every column that a format reads; of a path such as `meta.title` its beginnings too."""
    entry, named = FORMATS[name], columns_named(name, settings)
    paths = (named.needed | named.optional).union(*(_beginnings(path) for path in named.needed | named.optional))
    return {*chain.from_iterable(required_columns(entry)), *entry.optional} - named.unread | paths


def _beginnings(path: str) -> set[str]:
    return {path[:at] for at, sign in enumerate(path) if sign == "."}


def parse_record(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowContent:
    """The content of a record in a format; a `RowError` where it has none. `settings`: None for the defaults."""
    entry = FORMATS[name]
    settings = entry_settings(FORMATS, name) if settings is None else settings
    try:
        return entry.function(record) if settings is None else entry.function(record, settings)
    except RecursionError as error:
        raise RowError("the row is nested too deeply") from error


def detect(records: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
    """The format that these rows have, and why. A format fits when its columns hold something in some row. One that
    asks for all columns of another and for more goes before it. Formats that can read none of the rows drop out where
    others can. A `UserError` where no format fits, or several do; `where` names the rows' source in it."""
    columns, fitting = _fitting_formats(records)
    if columns >= _FLAT_OASST:
        what = "each row is one message (message_id, role, text), as in OpenAssistant's flat files"
        raise UserError(f"{where}: {what}. Take the file of trees (.trees.jsonl.gz), or write format: text.")
    fitting = [entry for entry in fitting if not _has_longer_variant(entry, fitting)]
    readable = [entry for entry in fitting if any(_complaint(entry.name, None, record) is None for record in records)]
    # Where a format's own columns are there and no row is right, each row's error tells best what is wrong with it.
    chosen = readable or [entry for entry in fitting if len(fitting) == 1 and not _has_longer_variant(entry, FORMATS)]
    shown_columns = one_line(", ".join(sorted(columns)), 200) or "none"
    if len(chosen) == 1:
        present = (next(name for name in names if name in columns) for names in required_columns(chosen[0]))
        return chosen[0].name, f"rows have {' and '.join(map(repr, present))}"
    if chosen:
        fit = f"the columns ({shown_columns}) fit several formats: {', '.join(entry.name for entry in chosen)}"
        raise UserError(f"{where}: {fit}. Write one of them in data.format.")
    as_one = (f"As {entry.name}: {one_line(str(_complaint(entry.name, None, records[0])), 200)}. " for entry in fitting)
    telling = [entry for entry in FORMATS if entry.columns]
    needs = (f"{entry.name} needs {', '.join(map(' or '.join, required_columns(entry)))}" for entry in telling)
    remedy = "Map other names with data.columns, for example columns: {prompt: question, completion: answer}."
    what = f"no format fits the columns ({shown_columns}). {_hint(records, where)}{''.join(as_one)}{'; '.join(needs)}"
    raise UserError(f"{where}: {what}. {remedy}")


def is_readable(name: str | None, settings: Section | None, records: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a format (the detected one where `name` is None) reads one of these records, and `column` if not ""."""
    try:
        format_name = name or detect(records, "")[0]
    except UserError:
        return False
    reads_column = not column or column in columns_read(format_name, settings)
    return reads_column and any(_complaint(format_name, settings, record) is None for record in records)


def _fitting_formats(records: Sequence[Mapping[str, Any]]) -> tuple[set[str], list[FormatSpec]]:
    """The columns that hold something, and the formats that they fit. Where they fit none, a column that holds nothing
    but empty texts and lists counts too: it tells what the rows are."""
    filled = {column for record in records for column, value in record.items() if not is_empty(value)}
    present = {column for record in records for column, value in record.items() if value is not None}
    for columns in (filled, present):
        telling = (one for one in FORMATS if one.columns)
        fitting = [one for one in telling if not any(columns.isdisjoint(names) for names in required_columns(one))]
        if fitting:
            return columns, fitting
    return present, []


def _has_longer_variant(entry: FormatSpec, entries: Iterable[FormatSpec]) -> bool:
    """Whether another of these formats asks for all columns of `entry` and for more."""
    return any(set(required_columns(other)) > set(required_columns(entry)) for other in entries)


def _complaint(name: str, settings: Section | None, record: Mapping[str, Any]) -> RowError | None:
    try:
        parse_record(name, settings, record)
    except RowError as error:
        return error
    return None


def _hint(records: Sequence[Mapping[str, Any]], where: str) -> str:
    lists = [column for column, value in records[0].items() if isinstance(value, list) and value]
    if len(records) == 1 and (rows := [column for column in lists if isinstance(records[0][column][0], Mapping)]):
        return f"The rows seem to be under {rows[0]!r}: give a file of that list alone. "
    is_table = data_suffix(where).startswith((".csv", ".tsv"))
    return "The first line names the columns: put such a line above the rows where there is none. " if is_table else ""


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing; a 0 or a false holds something."""
    return value is None or value in ("", [], {})


def expect(value: Any, kinds: Any, reason: str, where: str) -> Any:
    """The value, where it is of these types; else a `RowError` with the reason and what it is."""
    if not isinstance(value, kinds):
        raise RowError(reason, f"{where} {kind(value)}")
    return value


def text_column(record: Mapping[str, Any], column: str) -> str:
    """The text in a column; a `RowError` where there is none."""
    value = record.get(column)
    if value is None:
        raise RowError(f"the column {column!r} is missing or null")
    if not isinstance(value, str):
        raise RowError(f"the column {column!r} is not a text", f"it is {kind(value)}")
    return value


def filled_column(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The one of these columns that holds something; the first where none does."""
    filled = [name for name in names if not is_empty(record.get(name))]
    if len(filled) > 1:
        raise RowError(f"the row has both {' and '.join(map(repr, filled))}: one of them would not be trained on")
    return filled[0] if filled else names[0]


def add_system_and_tools(record: Mapping[str, Any], messages: list[Message]) -> Conversation:
    """The messages as a conversation, with the row's own `system` text above them and its `tools`."""
    if not is_empty(record.get("system")):
        if messages[0]["role"] == "system":
            raise RowError("the row has a system prompt twice, in the column 'system' and as its first message")
        messages = [{"role": "system", "content": text_column(record, "system")}, *messages]
    tools = None if is_empty(record.get("tools")) else _parse_tools(record["tools"])
    if tools:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        for function in (call["function"] for message in messages for call in message.get("tool_calls", ())):
            function["arguments"] = _without_filled_members(function["arguments"], schemas.get(function["name"]))
    return Conversation(messages, tools)


def question_and_answer(record: Mapping[str, Any], question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return add_system_and_tools(record, messages)


def parse_json(text: str, what: str) -> Any:
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError, RowError) as error:
        raise RowError(f"{what.rstrip('0123456789 ')} is not valid JSON", f"{what}: {error}") from error


def _parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of functions' JSON schemas or of their JSON texts, or the JSON text of such a list."""
    if isinstance(value, str):
        value = parse_json(value, "the column 'tools'")
    expect(value, list | None, "the column 'tools' is not a list of functions", "it is")
    return [_parse_tool(raw, f"tool {position}") for position, raw in enumerate(value or (), start=1)] or None


def _parse_tool(raw: Any, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        raw = parse_json(raw, where)
    function = expect(raw, Mapping, "a tool is not an object", f"{where} is").get("function")
    if function is None:
        function = {key: value for key, value in raw.items() if key not in ("type", "function")}
    if raw.get("type") not in (None, "function"):
        raise RowError("a tool is of another type than function", f"{where} has {raw['type']!r}")
    if not _has_name(function):
        raise RowError("a tool has no name", where)
    return {"type": "function", "function": _without_fillers(function)}


def _has_name(function: Any) -> bool:
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"])


def _without_fillers(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return [_without_fillers(item) for item in schema] if isinstance(schema, list) else schema
    null = {"const"} | ({"default"} if _allows_null(schema) else set())  # where a null says something
    given = {key: value for key, value in schema.items() if value is not None or key in null}
    return {key: value if key in _SCHEMA_VALUES else _without_fillers(value) for key, value in given.items()}


def _allows_null(schema: Any) -> bool:
    """Whether null is a value of this JSON schema, as far as it says."""
    if not isinstance(schema, Mapping):
        return schema is not False
    types, variants = schema.get("type"), [*_list_of(schema, "anyOf"), *_list_of(schema, "oneOf")]
    if schema.get("nullable") is True or None in _list_of(schema, "enum"):
        return True
    plain = types in (None, "null") or (isinstance(types, list) and "null" in types)
    return any(map(_allows_null, variants)) if variants else plain


def _list_of(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def parse_call(raw: Any, where: str) -> dict[str, Any]:
    """A call of a tool as {"type": "function", "function": {"name", "arguments"}} with its `id`, where it may be bare
    ({"name", "arguments"}) and its arguments a JSON text."""
    expect(raw, Mapping, "a tool call is not an object", f"{where} has")
    function, parts, known = raw.get("function"), ("name", "arguments"), {"id", "type", "function"}
    if function is None:
        function = {key: raw[key] for key in parts if key in raw}
        known.update(parts)
    if not _has_name(function):
        raise RowError("a tool call names no function", where)
    unknown = [key for key in raw if key not in known and raw[key] is not None]
    unknown += [key for key in function if key not in parts and function[key] is not None]
    if unknown or raw.get("type") not in (None, "function"):
        what = repr(sorted(unknown)[0]) if unknown else f"the type {raw['type']!r}"
        raise RowError("a tool call has parts that would not be trained on", f"{where} has {what}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "the arguments of a tool call") if arguments.strip() else None
    expect(arguments, Mapping | None, "the arguments of a tool call are not an object", f"{where} has")
    expect(raw.get("id"), str | None, "the id of a tool call is not a text", f"{where} has")
    call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}
    return call if raw.get("id") is None else call | {"id": raw["id"]}


def _without_filled_members(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_without_filled_members(item, schema.get("items")) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return value
    required = _list_of(schema, "required")
    return {
        name: _without_filled_members(inner, properties.get(name))
        for name, inner in value.items()
        if inner is not None or name in required or (name in properties and _allows_null(properties[name]))
    }
