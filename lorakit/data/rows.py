"""Rows: raw records with their places, what they say (a conversation, a text or token ids), the tokens that become of
it, and why a row could not be used."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from lorakit.recipe.problem import one_line

_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
_KINDS |= {str: "a text", list: "a list", dict: "an object"}


class RowError(Exception):
    """One row cannot become an example; the caller knows which. `reason` is the same for all rows that fail alike, so
    that they can be counted; `case` is what this row has."""

    def __init__(self, reason: str, case: str = "") -> None:
        super().__init__(f"{reason}: {case}" if case else reason)
        self.reason = reason
        self.case = case

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.reason, self.case)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), type(value).__name__)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would silently keep the last of two values under one name."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("an object has the same name twice", one_line(repr(twice)))
    return record


def _refuse_constant(word: str) -> Any:
    raise RowError("not valid JSON", f"{word} is not a JSON value: write null or a number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
"""Refuses, as a `RowError`, what Python's decoder takes although it is not JSON. Made once: json.loads makes one for
each call that names a hook, which takes as long as a short row."""


def normalize_line_ends(value: Any) -> Any:
    """`value` with `\\r\\n` as `\\n` in all texts; a `RowError` for a value that is nested too deeply."""

    def normalized(inner: Any) -> Any:
        if isinstance(inner, str):
            return inner.replace("\r\n", "\n") if "\r\n" in inner else inner
        if isinstance(inner, dict):
            return {key: normalized(item) for key, item in inner.items()}
        if isinstance(inner, list) and not (inner and isinstance(inner[0], int)):  # no walk through token ids
            return [normalized(item) for item in inner]
        return inner

    try:
        return normalized(value)
    except RecursionError:
        return RowError("the row is nested too deeply")


@dataclass(frozen=True)
class Row:
    """One raw record, or why it could not be read, and its place, such as `train.jsonl:17`."""

    where: str
    record: dict[str, Any] | RowError


@dataclass(frozen=True)
class Block:
    """Some rows of one source that are not parsed yet: they can be handed to another process as they are. `parse(name,
    first, payload)` gives the rows; `name` is the file as messages name it, `first` the number of the first line or
    row. `size` is how many bytes of the source (as stored) the block stands for."""

    name: str
    first: int
    payload: Any
    parse: Callable[[str, int, Any], Iterator[Row]]
    size: int

    def rows(self) -> Iterator[Row]:
        return self.parse(self.name, self.first, self.payload)


def block_of(rows: list[Row]) -> Block:
    return Block(rows[0].where if rows else "", 1, rows, lambda name, first, parsed: iter(parsed), 0)


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
    """Messages in their order, and the tools (JSON schemas of functions) that the model is told of. `fixed`: how many
    messages after the system prompt are the recipe's own, the same in every row."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    fixed: int = 0

    @property
    def own_messages(self) -> list[Message]:
        """What the row itself says: the messages without system prompts and the recipe's own examples."""
        return [message for message in self.messages if message["role"] != "system"][self.fixed :]


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


def hash_row(content: RowContent) -> bytes:
    """The sha256 of a row's own content, without system prompt and the recipe's examples: the same in every process and
    version, whatever file and format the row came from."""
    if isinstance(content, Conversation):
        messages = content.own_messages
        value: Any = [messages, content.tools] if content.tools else messages
    else:
        value = asdict(content)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


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


def refuse_half_characters(text: str) -> None:
    """Refuse a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = repr(text[error.start])
        raise RowError("a message has half of a surrogate pair, which is not a character", half) from error
