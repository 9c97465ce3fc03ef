"""Formats: how one raw record becomes a conversation. One plain function each.

A format function takes the record as a dict and returns a list of messages, `{"role": ..., "content": ...}`, or raises
`RowError` with what is wrong. `columns` are those by which auto-detection recognises the format, `optional` the others
that it reads.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.errors import UserError
from lorakit.tables import FORMATS

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant", "tool")

_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class RowError(Exception):
    """One row cannot become an example; the caller knows which row.

    `reason` is the same for all rows that fail alike, so that they can be counted; `case` is what this row has.
    """

    def __init__(self, reason: str, case: str = "") -> None:
        super().__init__(f"{reason}: {case}" if case else reason)
        self.reason = reason
        self.case = case


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), type(value).__name__)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError(f"the column {column!r} is missing or null")
    if not isinstance(value, str):
        raise RowError(f"the column {column!r} is not a text", f"it is {kind(value)}")
    return value


def _message(position: int, raw: Any) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError("a message is not an object with role and content", f"message {position} is {kind(raw)}")
    role, content = raw.get("role"), raw.get("content")
    if role not in ROLES:
        raise RowError(f"a message has none of the roles {', '.join(ROLES)}", f"message {position} has {role!r}")
    if not isinstance(content, str):
        raise RowError("a message has no text in 'content'", f"message {position} ({role}) has {kind(content)}")
    unknown = sorted(key for key, value in raw.items() if key not in ("role", "content") and not _empty(value))
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise RowError("a message has parts that would not be trained on", f"message {position} ({role}) has {named}")
    return {"role": str(role), "content": content}


def _empty(value: Any) -> bool:
    """Nothing was said; a 0 or a false says something."""
    return value is None or value in ("", [], {})


def _with_system(row: Mapping[str, Any], conversation: Conversation) -> Conversation:
    """The conversation below the row's own `system` text, where it has one."""
    if not row.get("system"):
        return conversation
    if conversation[0]["role"] == "system":
        raise RowError("the row has a system prompt twice, in the column 'system' and as its first message")
    return [{"role": "system", "content": _text(row, "system")}, *conversation]


def _messages(raw: Any, column: str) -> Conversation:
    if raw is None:
        raise RowError(f"the column {column!r} is missing or null")
    if not isinstance(raw, list):
        raise RowError(f"the column {column!r} is not a list of messages", f"it is {kind(raw)}")
    if not raw:
        raise RowError(f"the column {column!r} is an empty list")
    return [_message(position, message) for position, message in enumerate(raw, start=1)]


@FORMATS.register("messages", columns=("messages",), optional=("system",))
def messages(row: Mapping[str, Any]) -> Conversation:
    """`messages`: a list of {role, content}, roles system, user, assistant and tool."""
    return _with_system(row, _messages(row.get("messages"), "messages"))


@FORMATS.register("alpaca", columns=("instruction", "output"), optional=("input", "system"))
def alpaca(row: Mapping[str, Any]) -> Conversation:
    """`instruction`, optionally `input` (added below it after an empty line), and `output`."""
    prompt = _text(row, "instruction")
    if row.get("input") not in (None, ""):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    answer = {"role": "assistant", "content": _text(row, "output")}
    return _with_system(row, [{"role": "user", "content": prompt}, answer])


@FORMATS.register("prompt-completion", columns=("prompt", "completion"), optional=("system",))
def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion`: two texts, or two lists of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _with_system(row, [*_messages(prompt, "prompt"), *_messages(completion, "completion")])
    question = {"role": "user", "content": _text(row, "prompt")}
    return _with_system(row, [question, {"role": "assistant", "content": _text(row, "completion")}])


def detect(columns: set[str], where: str) -> tuple[str, str]:
    """The format that rows with these columns have, and why.

    Raises:
        UserError: no format fits, or several do.
    """
    fitting = [entry for entry in FORMATS if set(entry.facts["columns"]) <= columns]
    seen = ", ".join(sorted(columns)) or "none"
    if len(fitting) == 1:
        wanted = " and ".join(repr(column) for column in fitting[0].facts["columns"])
        return fitting[0].name, f"rows have {wanted}"
    if fitting:
        names = ", ".join(entry.name for entry in fitting)
        raise UserError(
            f"{where}: the columns ({seen}) fit several formats: {names}. Write one of them in data.format."
        )
    known = "; ".join(f"{entry.name} needs {', '.join(entry.facts['columns'])}" for entry in FORMATS)
    raise UserError(
        f"{where}: no format fits the columns ({seen}). {known}. Map other names with data.columns, for example "
        "columns: {prompt: question, completion: answer}."
    )
