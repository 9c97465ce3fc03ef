"""Conversations as messages: `messages`, lists in OpenAI's shape with what is usually added to it; `sharegpt`, lists of
{from, value} under the role names that are found in the wild; `oasst`, OpenAssistant's trees, of which the best
conversation is taken."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from lorakit.data.formats.columns import add_system_and_tools, expect, filled_column, is_empty, parse_call, parse_json
from lorakit.data.rows import ROLES, Conversation, Message, RowError, kind, normalize_line_ends
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.problem import one_line, quote
from lorakit.registry import FORMATS, Section

# OpenAI's newer name of the system role, and its older one of the tool role.
_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
_PLAIN = {"role", "content"}
_THINKING = ("thinking", "reasoning_content", "reasoning")
# What only messages of one role may have.
_ASSISTANT = (*_THINKING, "tool_calls", "function_call", "train", "weight", "prefix")
_TOOL = ("name", "tool_call_id")

_TURNS, _CALL = ("conversations", "conversation"), "function_call"
_ROLES_IN_TREES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant"}
# ShareGPT's words for each role, common misspellings among them, in lower case and with `_`.
_WORDS_OF_ROLES = {
    "system": "system system_prompt systen sytem systme sysem systm developer",
    "user": "user human prompter humam humman huamn hunan hman usr usre uesr",
    "assistant": "assistant gpt chatgpt gpt4 gpt_4 gpt_3.5 bard bing claude llm model ai bot chatbot gtp chatgtp "
    "assistent asistant assitant assisstant assistan assisant",
    "tool": "tool observation function_response tool_response function function_result tool_result ipython observaton "
    "obervation",
    _CALL: "function_call tool_call functioncall toolcall",
}
_SHAREGPT_ROLES = {word: role for role, words in _WORDS_OF_ROLES.items() for word in words.split()}


@FORMATS.register("messages", columns=("messages",), optional=("system", "tools"))
def messages(record: Mapping[str, Any]) -> Conversation:
    """`messages`: a list of {role, content}, roles system, user, assistant and tool."""
    parsed = parse_messages(record.get("messages"), "messages")
    return add_system_and_tools(record, mark_given_beginnings(parsed))


class Sharegpt(Section):
    """How rows of the format `sharegpt` are read."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Their word for a role, in any letter case -> our role. It takes precedence over the known words."""


def _sharegpt_mistakes(settings: Sharegpt) -> Iterator[tuple[tuple[str, str], str, str]]:
    seen: dict[str, str] = {}
    for word in settings.roles:
        before = seen.setdefault(_folded(word), word)
        if before != word:
            yield ("roles", word), f"it is the same word as {quote(before)}, apart from case", "Remove one."


@FORMATS.register(
    "sharegpt", columns=(_TURNS,), optional=("system", "tools"), settings=Sharegpt, mistakes=_sharegpt_mistakes
)
def sharegpt(record: Mapping[str, Any], settings: Sharegpt) -> Conversation:
    """`conversations`: a list of {from, value}, from human, gpt, system, tool, function_call and their other names."""
    column = filled_column(record, _TURNS)
    turns = parse_list(record.get(column), column, "turns")
    theirs = {_folded(word): role for word, role in settings.roles.items()}
    messages = [_parse_turn(position, turn, theirs) for position, turn in enumerate(turns, start=1)]
    return add_system_and_tools(record, mark_given_beginnings(messages))


def parse_messages(raw: Any, column: str) -> list[Message]:
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
            what = "an answer that is not trained comes before one that is, and nothing says whether both are one turn"
            raise RowError(f"{what} (write prefix: true on the first where they are, else prefix: false)", where)
        if goes_on is False:
            del message["prefix"]
        if goes_on and after["role"] != "assistant":
            raise RowError("no answer follows a message with prefix: true, which would go on with it", where)
        if goes_on and (message.keys() & {"thinking", "tool_calls"} or "thinking" in after or "prefix" in after):
            what = "a given beginning (prefix: true) and what goes on with it are without thinking and calls between"
            raise RowError(f"{what} (write both into one message, or leave the rest out)", where)
    return messages


def parse_list(raw: Any, column: str, noun: str) -> list[Any]:
    """A column that holds a list of at least one item, or its JSON text."""
    if raw is None:
        raise RowError(f"the column {column!r} is missing or null")
    if isinstance(raw, str):
        raw = parse_if_json(raw, column)
    if not expect(raw, list, f"the column {column!r} is not a list of {noun}", "it is"):
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
    message |= _text_parts(parts, _TOOL, where)
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


def _text_parts(parts: Mapping[str, Any], keys: Iterable[str], where: str) -> dict[str, str]:
    given = (key for key in keys if key in parts)
    return {key: expect(parts[key], str, f"a message's {key!r} is not a text", f"{where} has") for key in given}


def _assistant_parts(parts: Mapping[str, Any], where: str) -> Message:
    """What an assistant's message has besides its content: thinking, calls of tools, and whether it is trained."""
    message: Message = {}
    thinking = {*_text_parts(parts, _THINKING, where).values()}
    if len(thinking) > 1:
        raise RowError("a message has two different reasonings", where)
    if thinking:
        message["thinking"] = thinking.pop()
    calls: Any = [parts["function_call"]] if "function_call" in parts else parts.get("tool_calls")
    if {"tool_calls", "function_call"} <= parts.keys():
        raise RowError("a message has both 'tool_calls' and 'function_call'", where)
    if expect(calls, list | None, "'tool_calls' is not a list of calls", f"{where} has") is not None:
        message["tool_calls"] = [parse_call(raw, where) for raw in calls]
    train, weight = parts.get("train"), parts.get("weight")
    for key in ("train", "prefix"):
        expect(parts.get(key), bool | None, f"{key!r} is not true or false", f"{where} has")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError("'weight' is not 0 or 1", f"{where} has {one_line(repr(weight))}")
    if train is not None and weight is not None and train != bool(weight):
        raise RowError("'train' and 'weight' contradict each other", where)
    if train is False or weight == 0:
        message["train"] = False
    if "prefix" in parts:
        if parts["prefix"] and train:
            raise RowError("a message is given (prefix: true) and trained (train: true)", where)
        message["prefix"] = parts["prefix"]
    return message


def _parse_turn(position: int, raw: Any, theirs: Mapping[str, str]) -> Message:
    """A turn of ShareGPT; `theirs`: the recipe's words for roles."""
    expect(raw, Mapping, "a turn is not an object with from and value", f"turn {position} is")
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
    one, other = raw.get(names[0]), raw.get(names[1])
    if not is_empty(one) and not is_empty(other) and one != other:
        raise RowError(f"a turn has both {names[0]!r} and {names[1]!r}", f"turn {position}")
    return other if one is None or (is_empty(one) and not is_empty(other)) else one


def _role(word: Any, position: int, theirs: Mapping[str, str]) -> str:
    folded = _folded(expect(word, str, "a turn does not say who speaks, in 'from'", f"turn {position} has"))
    role = theirs.get(folded) or _SHAREGPT_ROLES.get(folded)
    if role is None:
        near = _nearest(folded, (*theirs, *_SHAREGPT_ROLES))
        case = f"turn {position} has {one_line(repr(word))}." + (f" Did you mean {near}?" if near else "")
        raise RowError("a turn has an unknown role (map it with data.format: {sharegpt: {roles: {their: ours}}})", case)
    return role


_nearest = functools.lru_cache(maxsize=256)(nearest)


def _folded(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")


@FORMATS.register("oasst", columns=("prompt",), optional=("system",))
def oasst(record: Mapping[str, Any]) -> Conversation:
    """`prompt`: a tree of messages with `replies` (OpenAssistant). The best reply is taken at each of its levels."""
    node = expect(record.get("prompt"), Mapping, "the column 'prompt' is not a tree of messages", "it is")
    if not _is_good_reply(node):
        raise RowError("the prompt of the tree is deleted, or failed its review")
    path: list[Message] = []
    while node is not None:
        word, text, level = node.get("role"), node.get("text"), len(path) + 1
        role = _ROLES_IN_TREES.get(word) if isinstance(word, str) else None
        if role is None:
            reason = f"a message of the tree has none of the roles {', '.join(_ROLES_IN_TREES)}"
            raise RowError(reason, f"level {level}: {one_line(repr(word))}")
        expect(text, str, "a message of the tree has no text in 'text'", f"level {level} has")
        path.append({"role": role, "content": text})
        node = _find_best_reply(node.get("replies"), level + 1)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    if not path:
        raise RowError("the tree has no answer")
    return add_system_and_tools(record, path)


def _find_best_reply(replies: Any, level: int) -> Mapping[str, Any] | None:
    if replies is None:
        return None
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError("the replies in a tree are not a list of messages", f"level {level}")
    return min(filter(_is_good_reply, replies), key=_order_reply, default=None)


def _is_good_reply(node: Mapping[str, Any]) -> bool:
    return node.get("deleted") is not True and node.get("review_result") is not False


def _order_reply(node: Mapping[str, Any]) -> tuple[float, float]:
    """First low ranks, then high scores; a reply without either comes after those with it. Without a score, the
    reviewers' average quality counts: {"quality": {"value": 0.7, "count": 3}}."""
    rank, score, labels = _number(node.get("rank")), _number(node.get("score")), node.get("labels")
    quality = labels.get("quality") if isinstance(labels, Mapping) else None
    if score is None and isinstance(quality, Mapping):
        score = _number(quality.get("value"))
    return math.inf if rank is None else rank, math.inf if score is None else -score


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and (isinstance(value, int) or math.isfinite(value)) else None
