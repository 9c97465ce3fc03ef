"""`sharegpt`: conversations as {from, value}, under the role names that are found in the wild."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lorakit.data.conversations import Conversation, Message
from lorakit.data.formats.columns import add_system_and_tools, filled_column, is_empty, parse_json
from lorakit.data.formats.messages import mark_given_beginnings, parse_list, parse_message
from lorakit.data.rows import RowError, kind
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.problem import one_line, quote
from lorakit.registry import FORMATS, Section

_COLUMNS = ("conversations", "conversation")
_CALL = "function_call"
# The words for each role, common misspellings among them, in lower case and with `_`.
_WORDS_OF_ROLES = {
    "system": "system system_prompt systen sytem systme sysem systm developer",
    "user": "user human prompter humam humman huamn hunan hman usr usre uesr",
    "assistant": "assistant gpt chatgpt gpt4 gpt_4 gpt_3.5 bard bing claude llm model ai bot chatbot gtp chatgtp "
    "assistent asistant assitant assisstant assistan assisant",
    "tool": "tool observation function_response tool_response function function_result tool_result ipython observaton "
    "obervation",
    _CALL: "function_call tool_call functioncall toolcall",
}
_ROLES = {word: role for role, words in _WORDS_OF_ROLES.items() for word in words.split()}


class Sharegpt(Section):
    """How rows of the format `sharegpt` are read."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Their word for a role, in any letter case -> our role. It comes before the words that are known."""


def mistakes(settings: Sharegpt) -> Iterator[tuple[tuple[str, str], str, str]]:
    """What cannot work in these settings: the key, the reason, and what to write instead."""
    seen: dict[str, str] = {}
    for word in settings.roles:
        before = seen.setdefault(_folded(word), word)
        if before != word:
            yield ("roles", word), f"it is the same word as {quote(before)}, apart from case", "Remove one."


@FORMATS.register("sharegpt", columns=(_COLUMNS,), optional=("system", "tools"), settings=Sharegpt, mistakes=mistakes)
def sharegpt(record: Mapping[str, Any], settings: Sharegpt) -> Conversation:
    """`conversations`: a list of {from, value}, from human, gpt, system, tool, function_call and their other names."""
    column = filled_column(record, _COLUMNS)
    turns = parse_list(record.get(column), column, "turns")
    theirs = {_folded(word): role for word, role in settings.roles.items()}
    messages = [_turn(position, turn, theirs) for position, turn in enumerate(turns, start=1)]
    return add_system_and_tools(record, mark_given_beginnings(messages))


def _turn(position: int, raw: Any, theirs: Mapping[str, str]) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError("a turn is not an object with from and value", f"turn {position} is {kind(raw)}")
    word, value = _either(raw, ("from", "role"), position), _either(raw, ("value", "content"), position)
    role = _role(word, position, theirs)
    rest = {key: inner for key, inner in raw.items() if key not in ("from", "role", "value", "content")}
    if role == _CALL:
        if not is_empty(rest.get("tool_calls")):
            raise RowError("a function_call turn has 'tool_calls' besides", f"turn {position}")
        if isinstance(value, str):
            value = parse_json(value, "the value of a function_call turn")
        if is_empty(value) or not isinstance(value, (list, Mapping)):
            raise RowError("the value of a function_call turn is not a call", f"turn {position} has {kind(value)}")
        calls = value if isinstance(value, list) else [value]
        return parse_message(position, {**rest, "role": "assistant", "content": None, "tool_calls": calls})
    if role != "assistant":
        # SlimOrca and others write on every turn whether it is trained; only answers ever are.
        rest = {key: inner for key, inner in rest.items() if key not in ("weight", "train") or inner not in (0, False)}
    return parse_message(position, {**rest, "role": role, "content": value})


def _either(raw: Mapping[str, Any], names: tuple[str, str], position: int) -> Any:
    """The value under either name."""
    one, other = raw.get(names[0]), raw.get(names[1])
    if not is_empty(one) and not is_empty(other) and one != other:
        raise RowError(f"a turn has both {names[0]!r} and {names[1]!r}", f"turn {position}")
    return other if one is None or (is_empty(one) and not is_empty(other)) else one


def _role(word: Any, position: int, theirs: Mapping[str, str]) -> str:
    if not isinstance(word, str):
        raise RowError("a turn does not say who speaks, in 'from'", f"turn {position} has {kind(word)}")
    folded = _folded(word)
    role = theirs.get(folded) or _ROLES.get(folded)
    if role is None:
        near = _nearest(folded, (*theirs, *_ROLES))
        raise RowError(
            "a turn has an unknown role (map it with data.format: {sharegpt: {roles: {their: ours}}})",
            f"turn {position} has {one_line(repr(word))}." + (f" Did you mean {near}?" if near else ""),
        )
    return role


_nearest = functools.lru_cache(maxsize=256)(nearest)


def _folded(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")
