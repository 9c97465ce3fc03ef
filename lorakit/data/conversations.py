"""What a row says: a conversation, a text, or token ids."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` (one of ROLES) and `content` (a text, maybe empty). An assistant's may have `thinking` (a text) and
`tool_calls` (a list of {"type": "function", "function": {"name", "arguments"}}, `arguments` an object), and
`train: False` where the turn is read and not trained, and `prefix: True` where it is the given beginning of a turn that
the next message goes on with. A tool's may have `name` and `tool_call_id`."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and the tools (JSON schemas of functions) that the model is told of."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Text:
    """A document: every token of it is trained, and the token that ends it."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """An example made elsewhere: token ids, and labels of the same length (-100 where not trained)."""

    input_ids: list[int]
    labels: list[int]


Said = Conversation | Text | Tokens
