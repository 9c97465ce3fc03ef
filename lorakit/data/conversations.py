"""What a row says (a conversation, a text or token ids), its hash, and the tokens that become of it."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

IGNORED = -100
"""torch's ignore_index: the label of a token that is not trained."""

Message = dict[str, Any]
"""`role` (one of ROLES) and `content` (a text, maybe empty). An assistant's may have `thinking` (a text) and
`tool_calls` (a list of {"type": "function", "function": {"name", "arguments"}}, `arguments` an object), and
`train: False` where the turn is read and not trained, and `prefix: True` where it is the given beginning of a turn that
the next message continues. A tool's may have `name` and `tool_call_id`."""

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


RowContent = Conversation | Text | Tokens


def up_to_last_answer(content: RowContent) -> RowContent:
    """The row without the messages after its last answer, which are neither trained nor a prompt."""
    if not isinstance(content, Conversation):
        return content
    answers = [at for at, message in enumerate(content.messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == len(content.messages) - 1:
        return content
    return replace(content, messages=content.messages[: answers[-1] + 1])


def content_digest(content: RowContent) -> bytes:
    """The sha256 of a row's content without its system prompt: the same in every process and version, whatever file
    and format the row came from."""
    if isinstance(content, Conversation):
        messages = [message for message in content.messages if message["role"] != "system"]
        value: Any = [messages, content.tools] if content.tools else messages
    else:
        value = asdict(content)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def split_point(digest: bytes) -> float:
    """A number between 0 and 1 made of a row's digest, which decides the side of the split."""
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Encoded:
    """Token ids, labels of the same length (-100 where not trained), and the token range of each trained turn."""

    input_ids: list[int]
    labels: list[int]
    turns: list[tuple[int, int]]

    def truncated(self, limit: int) -> "Encoded | None":
        """The longest beginning that ends with a whole turn within `limit` tokens; None when not even the first fits: a
        turn cut in the middle would be trained without the token that ends it. A text is cut anywhere."""
        if not self.turns:
            return Encoded(self.input_ids[:limit], self.labels[:limit], [])
        turns = [turn for turn in self.turns if turn[1] <= limit]
        if not turns:
            return None
        return Encoded(self.input_ids[: turns[-1][1]], self.labels[: turns[-1][1]], turns)

    def pieces(self, limit: int) -> list["Encoded"]:
        """A text in as few pieces of at most `limit` tokens as possible, of about equal length."""
        length = len(self.input_ids)
        count = -(-length // limit)
        bounds = [length * number // count for number in range(count + 1)]
        return [Encoded(self.input_ids[start:end], self.labels[start:end], []) for start, end in pairwise(bounds)]
