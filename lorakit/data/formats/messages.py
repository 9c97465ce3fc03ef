"""`messages`: conversations in OpenAI's shape."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation
from lorakit.data.formats.columns import add_system_and_tools
from lorakit.data.formats.message import messages_of, with_given_beginnings
from lorakit.registry import FORMATS


@FORMATS.register("messages", columns=("messages",), optional=("system", "tools"))
def messages(record: Mapping[str, Any]) -> Conversation:
    """`messages`: a list of {role, content}, roles system, user, assistant and tool."""
    return add_system_and_tools(
        record, Conversation(with_given_beginnings(messages_of(record.get("messages"), "messages")))
    )
