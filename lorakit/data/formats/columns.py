"""What several formats read from a record's columns: a text, a system prompt, tools and the calls of them.

Parquet and Arrow store an object as a struct: every object of a column has the members of all, null where it has none.
Which nulls are such fillers is told from JSON Schema. In a schema, null is not a value of a keyword, but of `const` and
of a `default` where null is allowed. In the arguments of a call, a null is a filler where the row's own tools say that
the function takes no such argument, or that it may be left out and may not be null. All other nulls stay: without a
schema nobody can tell them from a null that was meant (arguments stored as JSON texts have no fillers).
"""

from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation, Message
from lorakit.data.rows import STRICT_JSON, RowError, kind

_SCHEMA_VALUES = ("const", "default", "enum", "examples", "example")
"""Keywords of JSON Schema that hold values and not schemas."""


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing; a 0 or a false holds something."""
    return value is None or value in ("", [], {})


def text_column(record: Mapping[str, Any], column: str) -> str:
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
    """A JSON text inside a row."""
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError, RowError) as error:
        raise RowError(f"{what.rstrip('0123456789 ')} is not valid JSON", f"{what}: {error}") from error


def _parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of functions' JSON schemas or of their JSON texts, or the JSON text of such a list."""
    if isinstance(value, str):
        value = parse_json(value, "the column 'tools'")
    if not isinstance(value, list | None):
        raise RowError("the column 'tools' is not a list of functions", f"it is {kind(value)}")
    return [_parse_tool(raw, f"tool {position}") for position, raw in enumerate(value or (), start=1)] or None


def _parse_tool(raw: Any, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        raw = parse_json(raw, where)
    if not isinstance(raw, Mapping):
        raise RowError("a tool is not an object", f"{where} is {kind(raw)}")
    function = raw.get("function")
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
    if isinstance(schema, Mapping):
        return {
            key: value if key in _SCHEMA_VALUES else _without_fillers(value)
            for key, value in schema.items()
            if value is not None or key == "const" or (key == "default" and _allows_null(schema))
        }
    return [_without_fillers(item) for item in schema] if isinstance(schema, list) else schema


def _allows_null(schema: Any) -> bool:
    """Whether null is a value of this JSON schema, as far as it says."""
    if not isinstance(schema, Mapping):
        return schema is not False
    types, variants = schema.get("type"), [*_list_of(schema, "anyOf"), *_list_of(schema, "oneOf")]
    if schema.get("nullable") is True or None in _list_of(schema, "enum"):
        return True
    if variants:
        return any(_allows_null(variant) for variant in variants)
    return types is None or types == "null" or (isinstance(types, list) and "null" in types)


def _list_of(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def parse_call(raw: Any, where: str) -> dict[str, Any]:
    """A call of a tool as {"type": "function", "function": {"name", "arguments"}} with its `id`, where it may be bare
    ({"name", "arguments"}) and its arguments a JSON text."""
    if not isinstance(raw, Mapping):
        raise RowError("a tool call is not an object", f"{where} has {kind(raw)}")
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
    if not isinstance(arguments, Mapping | None):
        raise RowError("the arguments of a tool call are not an object", f"{where} has {kind(arguments)}")
    if not isinstance(raw.get("id"), str | None):
        raise RowError("the id of a tool call is not a text", f"{where} has {kind(raw['id'])}")
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
