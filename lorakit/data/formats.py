"""Formats: how one raw record becomes a conversation. One plain function each.

A format function takes the record as a dict and returns a list of messages, `{"role": ..., "content": ...}`, or raises
`RowError` with what is wrong. `columns` are those by which auto-detection recognises the format.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.errors import UserError
from lorakit.tables import FORMATS

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant", "tool")


class RowError(Exception):
    """One row cannot become an example; the message says why, the caller knows which row."""


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row or row[column] is None:
        raise RowError(f"the column {column!r} is missing")
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"{column!r} is {type(value).__name__}, not text")
    return value


def _message(position: int, raw: Any) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError(f"message {position} is {type(raw).__name__}, not an object with role and content")
    role, content = raw.get("role"), raw.get("content")
    if role not in ROLES:
        raise RowError(f"message {position} has the role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"message {position} ({role}) has no text in 'content'")
    unknown = sorted(key for key, value in raw.items() if key not in ("role", "content") and value is not None)
    if unknown:
        raise RowError(
            f"message {position} ({role}) has {', '.join(map(repr, unknown))}, which would not be trained on"
        )
    return {"role": str(role), "content": content}


@FORMATS.register("messages", columns=("messages",))
def messages(row: Mapping[str, Any]) -> Conversation:
    """`messages`: a list of {role, content}, roles system, user, assistant and tool."""
    raw = row.get("messages")
    if not isinstance(raw, list) or not raw:
        raise RowError("'messages' is not a list with at least one message")
    return [_message(position, message) for position, message in enumerate(raw, start=1)]


@FORMATS.register(
    "alpaca",
    columns=(
        "instruction",
        "output",
    ),
)
def alpaca(row: Mapping[str, Any]) -> Conversation:
    """`instruction`, optionally `input` (added below it after an empty line), and `output`."""
    prompt = _text(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"'input' is {type(extra).__name__}, not text")
    if extra:
        prompt = f"{prompt}\n\n{extra}"
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [
        *system,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text(row, "output")},
    ]


@FORMATS.register(
    "prompt-completion",
    columns=(
        "prompt",
        "completion",
    ),
)
def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion`: two texts, or two lists of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return messages({"messages": [*prompt, *completion]})
    return [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]


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
