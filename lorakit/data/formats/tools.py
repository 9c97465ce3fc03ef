"""Tools and the calls of them, as templates expect them, from the shapes in which data sets store them.

Parquet and Arrow store an object as a struct: every object of a column has the members of all, null where it has none.
Which nulls are such fillers is told from JSON Schema. In a schema, null is no value of a keyword, but of `const` and of
a `default` where null is allowed. In the arguments of a call, a null is a filler where the row's own tools say that the
function takes no such argument, or that it may be left out and may not be null. All other nulls are kept: without a
schema nobody can tell them from a null that was meant (arguments stored as JSON texts have no fillers).
"""

import json
from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Message
from lorakit.data.rows import RowError, kind

Tool = dict[str, Any]
Call = dict[str, Any]


def tools_of(value: Any) -> list[Tool] | None:
    """The column `tools`: a list of functions' JSON schemas or of their JSON texts, or the JSON text of such a list.

    Each tool becomes {"type": "function", "function": {"name", ...}}. None where there are none.
    """
    if isinstance(value, str):
        value = parsed(value, "the column 'tools'")
    if value is None:
        return None
    if not isinstance(value, list):
        raise RowError("the column 'tools' is not a list of functions", f"it is {kind(value)}")
    return [_tool(raw, f"tool {position}") for position, raw in enumerate(value, start=1)] or None


def _tool(raw: Any, where: str) -> Tool:
    if isinstance(raw, str):
        raw = parsed(raw, where)
    if not isinstance(raw, Mapping):
        raise RowError("a tool is not an object", f"{where} is {kind(raw)}")
    function = raw.get("function")
    if function is None:
        function = {key: value for key, value in raw.items() if key not in ("type", "function")}
    if raw.get("type") not in (None, "function"):
        raise RowError("a tool is of another type than function", f"{where} has {raw['type']!r}")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("a tool has no name", where)
    return {"type": "function", "function": _without_fillers(function)}


def _without_fillers(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            key: value if key in _VALUES else _without_fillers(value)
            for key, value in schema.items()
            if value is not None or key == "const" or (key == "default" and _takes_null(schema))
        }
    return [_without_fillers(item) for item in schema] if isinstance(schema, list) else schema


# Keywords of JSON Schema that hold values and not schemas.
_VALUES = ("const", "default", "enum", "examples", "example")


def _takes_null(schema: Any) -> bool:
    """Whether null is a value of this JSON schema, as far as it says."""
    if not isinstance(schema, Mapping):
        return schema is not False
    types, others = schema.get("type"), [*_listed(schema, "anyOf"), *_listed(schema, "oneOf")]
    if schema.get("nullable") is True or None in _listed(schema, "enum"):
        return True
    if others:
        return any(_takes_null(other) for other in others)
    return types is None or types == "null" or (isinstance(types, list) and "null" in types)


def _listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    """A keyword's list; a schema that is none itself says nothing by it."""
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def calls_of(value: Any, where: str) -> list[Call]:
    """An assistant's `tool_calls`, each as {"type": "function", "function": {"name", "arguments"}} with its `id`.

    A call may be bare, {"name", "arguments"}. `arguments` is an object or its JSON text, and becomes the object.
    """
    if not isinstance(value, list):
        raise RowError("'tool_calls' is not a list of calls", f"{where} has {kind(value)}")
    return [_call(raw, where) for raw in value]


def _call(raw: Any, where: str) -> Call:
    if not isinstance(raw, Mapping):
        raise RowError("a tool call is not an object", f"{where} has {kind(raw)}")
    function = raw.get("function")
    if function is None:
        function = {key: raw[key] for key in ("name", "arguments") if key in raw}
        known = {"id", "type", "function", "name", "arguments"}
    else:
        known = {"id", "type", "function"}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("a tool call names no function", where)
    strange = [key for key in raw if key not in known and raw[key] is not None]
    strange += [key for key in function if key not in ("name", "arguments") and function[key] is not None]
    if strange or raw.get("type") not in (None, "function"):
        named = repr(sorted(strange)[0]) if strange else f"the type {raw['type']!r}"
        raise RowError("a tool call has parts that would not be trained on", f"{where} has {named}")
    call: Call = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function, where)}}
    if raw.get("id") is not None:
        if not isinstance(raw["id"], str):
            raise RowError("the id of a tool call is not a text", f"{where} has {kind(raw['id'])}")
        call["id"] = raw["id"]
    return call


def _arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = function.get("arguments")
    if isinstance(value, str):
        value = parsed(value, "the arguments of a tool call") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("the arguments of a tool call are not an object", f"{where} has {kind(value)}")
    return dict(value)


def without_filled_arguments(messages: list[Message], tools: list[Tool] | None) -> list[Message]:
    """The messages without the null arguments that the tools say are none; see the top of this file."""
    known = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = _meant(function["arguments"], known.get(function["name"]))
    return messages


def _meant(value: Any, schema: Any) -> Any:
    """A value of this schema without the null members that stand for nothing."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_meant(item, schema.get("items")) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return value
    needed = _listed(schema, "required")
    return {
        name: _meant(inner, properties.get(name))
        for name, inner in value.items()
        if inner is not None or name in needed or (name in properties and _takes_null(properties[name]))
    }


def parsed(text: str, what: str) -> Any:
    """A JSON text inside a row."""
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what.rstrip('0123456789 ')} is not valid JSON", f"{what}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one name Python would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")
