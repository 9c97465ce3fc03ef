"""`messages`: conversations in OpenAI's shape, with what is usually added to it."""

import re
from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import ROLES, Conversation, Message
from lorakit.data.formats.columns import add_system_and_tools, is_empty, parse_calls, parse_json
from lorakit.data.rows import RowError, kind, normalize_line_ends
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS

# OpenAI's newer name of the system role, and its older one of the tool role.
_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
_PLAIN = {"role", "content"}
_THINKING = ("thinking", "reasoning_content", "reasoning")
# What only messages of one role may have.
_ASSISTANT = (*_THINKING, "tool_calls", "function_call", "train", "weight", "prefix")
_TOOL = ("name", "tool_call_id")


@FORMATS.register("messages", columns=("messages",), optional=("system", "tools"))
def messages(record: Mapping[str, Any]) -> Conversation:
    """`messages`: a list of {role, content}, roles system, user, assistant and tool."""
    parsed = parse_messages(record.get("messages"), "messages")
    return add_system_and_tools(record, mark_given_beginnings(parsed))


def parse_messages(raw: Any, column: str) -> list[Message]:
    """A column that holds a list of messages."""
    return [parse_message(at, message) for at, message in enumerate(parse_list(raw, column, "messages"), start=1)]


def mark_given_beginnings(messages: list[Message]) -> list[Message]:
    """The messages, those marked `prefix: True` with which the next one goes on in the same turn."""
    for position, message in enumerate(messages):
        if len(message) == 2 or message["role"] != "assistant":
            continue
        after = messages[position + 1] if position + 1 < len(messages) else {"role": ""}
        goes_on, where = message.get("prefix"), f"message {position + 1}"
        is_read_only, next_is_read_only = (one.get("train") is False for one in (message, after))
        if goes_on is None and is_read_only and after["role"] == "assistant" and not next_is_read_only:
            raise RowError(
                "an answer that is not trained comes before one that is, and nothing says whether both are one turn "
                "(write prefix: true on the first where the second goes on with it, and prefix: false where it does "
                "not)",
                where,
            )
        if goes_on is False:
            del message["prefix"]
        if goes_on and after["role"] != "assistant":
            raise RowError("no answer follows a message with prefix: true, which would go on with it", where)
        if goes_on and (message.keys() & {"thinking", "tool_calls"} or "thinking" in after or "prefix" in after):
            raise RowError(
                "the given beginning of an answer (prefix: true) and what goes on with it are texts, without thinking "
                "and with calls only at the end (write both into one message, or leave the rest out)",
                where,
            )
    return messages


def parse_list(raw: Any, column: str, noun: str) -> list[Any]:
    """A column that holds a list of at least one item, or its JSON text."""
    if raw is None:
        raise RowError(f"the column {column!r} is missing or null")
    if isinstance(raw, str):
        raw = parse_if_json(raw, column)
    if not isinstance(raw, list):
        raise RowError(f"the column {column!r} is not a list of {noun}", f"it is {kind(raw)}")
    if not raw:
        raise RowError(f"the column {column!r} is an empty list")
    return raw


def parse_if_json(text: str, column: str) -> Any:
    """The list or object whose JSON a cell of a table holds; the text where it does not begin like one."""
    if re.match(r"\s*(\[\s*)?\{\s*'", text):
        raise RowError(f"the column {column!r} was written by Python, not as JSON (write it with json.dumps)")
    if not text.lstrip().startswith(("[", "{")):
        return text
    return normalize_line_ends(parse_json(text, f"the column {column!r}"))


def parse_message(position: int, raw: Any) -> Message:
    """One message; `position` counts from 1."""
    if not isinstance(raw, Mapping):
        raise RowError("a message is not an object with role and content", f"message {position} is {kind(raw)}")
    word, content = raw.get("role"), raw.get("content")
    role = _ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        given = one_line(repr(word))
        raise RowError(f"a message has none of the roles {', '.join(ROLES)}", f"message {position} has {given}")
    if isinstance(content, str) and raw.keys() == _PLAIN:
        return {"role": role, "content": content}
    where = f"message {position} ({role})"
    parts = {key: value for key, value in raw.items() if key not in _PLAIN and not is_empty(value)}
    if role != "assistant" and (marks := [key for key in parts if key in ("train", "weight")]):
        raise RowError(f"only an assistant's message may have {marks[0]!r}", where)
    unknown = sorted(parts.keys() - {"assistant": _ASSISTANT, "tool": _TOOL}.get(role, ()))
    if unknown:
        names = one_line(", ".join(map(repr, unknown)), 200)
        raise RowError("a message has parts that would not be trained on", f"{where} has {names}")
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        message |= _assistant_parts(parts, where)
    for key in _TOOL:
        if key in parts:
            message[key] = _text_part(parts[key], key, where)
    message["content"] = _content(content, where, may_be_empty="tool_calls" in message)
    return message


def _content(content: Any, where: str, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if is_empty(content) and may_be_empty:
        return ""
    if not isinstance(content, list) or not content:
        raise RowError("a message has no text in 'content'", f"{where} has {kind(content)}")
    texts = []
    for position, part in enumerate(content, start=1):
        filled = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        if filled.keys() != {"type", "text"} or filled["type"] != "text" or not isinstance(filled["text"], str):
            given = f"the type {one_line(repr(part.get('type')))}" if isinstance(part, Mapping) else kind(part)
            raise RowError("a message has a part that is not plain text", f"{where}, part {position}: {given}")
        texts.append(filled["text"])
    return "".join(texts)


def _assistant_parts(parts: Mapping[str, Any], where: str) -> Message:
    """What an assistant's message has besides its content: thinking, calls of tools, and whether it is trained."""
    message: Message = {}
    thinking = {_text_part(parts[key], key, where) for key in _THINKING if key in parts}
    if len(thinking) > 1:
        raise RowError("a message has two different reasonings", where)
    if thinking:
        message["thinking"] = thinking.pop()
    calls = [parts["function_call"]] if "function_call" in parts else parts.get("tool_calls")
    if {"tool_calls", "function_call"} <= parts.keys():
        raise RowError("a message has both 'tool_calls' and 'function_call'", where)
    if calls is not None:
        message["tool_calls"] = parse_calls(calls, where)
    if not _is_trained(parts, where):
        message["train"] = False
    if "prefix" in parts:
        if not isinstance(parts["prefix"], bool):
            raise RowError("'prefix' is not true or false", f"{where} has {kind(parts['prefix'])}")
        if parts["prefix"] and parts.get("train"):
            raise RowError("a message is given (prefix: true) and trained (train: true)", where)
        message["prefix"] = parts["prefix"]
    return message


def _is_trained(parts: Mapping[str, Any], where: str) -> bool:
    train, weight = parts.get("train"), parts.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("'train' is not true or false", f"{where} has {kind(train)}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError("'weight' is not 0 or 1", f"{where} has {one_line(repr(weight))}")
    if train is not None and weight is not None and train != bool(weight):
        raise RowError("'train' and 'weight' contradict each other", where)
    return train is not False and weight != 0


def _text_part(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"a message's {key!r} is not a text", f"{where} has {kind(value)}")
    return value
