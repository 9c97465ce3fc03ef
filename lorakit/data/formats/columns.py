"""What several formats read from a record's columns: a text, a column under either of two names, a system prompt."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation, Message
from lorakit.data.formats.tools import parse_tools, remove_filled_arguments
from lorakit.data.rows import RowError, kind


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
    tools = None if is_empty(record.get("tools")) else parse_tools(record["tools"])
    return Conversation(remove_filled_arguments(messages, tools) if tools else messages, tools)


def question_and_answer(record: Mapping[str, Any], question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return add_system_and_tools(record, messages)
