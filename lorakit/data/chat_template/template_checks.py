"""Refusals of rows that a chat template does not write as they are.

A template that leaves something out says nothing of it. Whether a text is written is seen by adding a mark to it and
looking for the mark; where it plainly stands in its place, that is not necessary.
"""

import json
from collections.abc import Iterator
from typing import Any

from lorakit.data.chat_template.spans import RenderedTurn, TemplatedRow
from lorakit.data.chat_template.template import ChatTemplate, has_thinking
from lorakit.data.conversations import Message
from lorakit.data.rows import RowError

# A longer system prompt that stands in a prompt is there because the template wrote it.
_TELLING = 20
_REMEDY = "give another model.chat_template"
TEMPLATED = "this row looks templated already (give its texts without the chat template's marks)"


def refuse_unwritten(talk: TemplatedRow, turn: RenderedTurn) -> None:
    """Refuse a turn of whose question or answer the template leaves something out."""
    message = talk.messages[turn.index]
    for index in _asking(talk.messages, turn.index):
        _refuse_unwritten_question(talk, turn, index)
    calls = message.get("tool_calls") or []
    if not calls and not has_thinking(message) and _in_frame(talk, turn, message["content"].strip()):
        return
    if has_thinking(message):
        _refuse_unwritten_text(talk, turn, "thinking")
    if message["content"].strip() or not (calls or has_thinking(message)):
        _refuse_unwritten_text(talk, turn, "content")
    for number in range(len(calls)):
        _refuse_unwritten_call(talk, turn, number)


def refuse_unwritten_tools(talk: TemplatedRow, turn: RenderedTurn) -> None:
    """Refuse a row with tools of which the model is told nothing."""
    if not talk.tools:
        return
    mark = _mark(turn.text)
    tool = {"name": mark, "description": mark, "parameters": {"type": "object", "properties": {}}}
    more = [*talk.tools, {"type": "function", "function": tool}]
    names = [str((tool.get("function") or tool).get("name", "")) for tool in talk.tools]
    prompt = talk.template.write(talk.adapted[: turn.index], ask=True, tools=more, variables=turn.form.variables)
    if mark not in prompt or not all(name in turn.prompt for name in names):
        raise RowError(
            "the chat template does not write the tools (put them into the system prompt, leave them out, or "
            f"{_REMEDY})"
        )


def given_characters(talk: TemplatedRow, turn: RenderedTurn) -> int:
    """How many characters of a turn are given, where its message has a given beginning.

    Raises:
        RowError: the template does not write the beginning as it is, so that none knows where the model goes on.
    """
    message = talk.messages[turn.index]
    begun = message.get("begun", "")
    if not begun.strip():
        return len(begun) if turn.said.startswith(begun) else 0
    begun = begun.lstrip()
    before, found, behind = turn.said.partition(begun)
    answer = message["content"][len(message["begun"]) :]
    if not found or not _squeezed(behind).startswith(_squeezed(answer)):
        raise RowError(
            "the chat template does not write the given beginning of an answer as it is (write it and the rest into "
            f"one message, or {_REMEDY})",
            talk.where(turn.index),
        )
    return len(before) + len(found)


def refuse_loose_marks(talk: TemplatedRow) -> None:
    """Refuse a row with a stop token inside a message, where it would end a turn, or a beginning of sequence."""
    for mark, why in forbidden_texts(talk.template).items():
        for index, message in enumerate(talk.messages):
            if any(mark in text for text in _texts(message)):
                raise RowError(f"a message contains the text {mark!r}, {why}", talk.where(index))
        if talk.tools and mark in _json(talk.tools):
            raise RowError(f"the tools contain the text {mark!r}, {why}")


def forbidden_texts(template: ChatTemplate) -> dict[str, str]:
    """The texts that no message may contain, and why."""
    begins = f"the beginning of sequence of this model: {TEMPLATED}"
    ends = (
        "which ends a turn of this model (take it out: where the row has the chat template's marks in it already, give "
        "its texts without them)"
    )
    beginnings_first = sorted(template.marks, key=lambda mark: (mark in template.stops, mark))
    return {mark: ends if mark in template.stops else begins for mark in beginnings_first}


def refuse_half_characters(text: str) -> None:
    """Refuse a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "a message has half of a surrogate pair, which is not a character", repr(text[error.start])
        ) from error


def _texts(message: Message) -> Iterator[str]:
    """Whatever of a message a template may write."""
    yield message["content"]
    if len(message) > 2:
        yield from (_json(value) for key, value in message.items() if key not in ("role", "content", "train"))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _asking(messages: list[Message], index: int) -> Iterator[int]:
    """The messages to which an answer answers: system prompts, and those since the answer before it. Where two answers
    follow each other, the first of them."""
    for at in range(index - 1, -1, -1):
        role = messages[at]["role"]
        if role == "assistant":
            if at == index - 1:
                yield at
            break
        yield at
    yield from (before for before in range(at) if messages[before]["role"] == "system")


def _refuse_unwritten_question(talk: TemplatedRow, turn: RenderedTurn, index: int) -> None:
    message = talk.messages[index]
    role, content = message["role"], message["content"].strip()
    if role not in ("assistant", "system") and content in turn.prompt:
        return
    elsewhere = any(content in other["content"] for at, other in enumerate(talk.messages) if at != index)
    if role == "system" and content in turn.prompt and len(content) > _TELLING and not elsewhere:
        return
    marked = message | {"content": message["content"] + _mark(turn.text)}
    if talk.prompt(turn.index, {index: marked}, turn.form.variables) != turn.prompt:
        return
    remedy = "put it into the first user message" if role == "system" else _REMEDY
    name = {"system": "a system prompt", "assistant": "an answer that another answer follows"}
    raise RowError(
        f"the chat template leaves out {name.get(role, f'a message of role {role}')} ({remedy})", talk.where(index)
    )


def _in_frame(talk: TemplatedRow, turn: RenderedTurn, content: str) -> bool:
    """Whether the answer stands in what the template writes around any, white space aside."""
    before, behind = talk.template.frame
    said = turn.said
    if not (said.startswith(before) and said.endswith(behind) and len(said) >= len(before) + len(behind)):
        return False
    return said[len(before) : len(said) - len(behind)].strip() == content


def _refuse_unwritten_text(talk: TemplatedRow, turn: RenderedTurn, field: str) -> None:
    """White space aside, a text of the answer must stand in the turn as it is."""
    message = talk.messages[turn.index]
    text, mark = message[field], _mark(turn.text)
    said, behind = _said_instead(talk, turn, message | {field: text.rstrip() + mark})
    if mark in behind:
        raise RowError(
            f"the chat template writes a token at which the model stops before the end of an answer ({_REMEDY})",
            f"{turn.span.stop!r} in {talk.where(turn.index)}",
        )
    if mark not in said or not _stands(_squeezed(text), turn):
        raise _unwritten(talk, turn, field)


def _stands(text: str, turn: RenderedTurn) -> bool:
    """Whether a text ends in the turn: its beginning may be what the prompt wrote of it, such as <think>."""
    said = _squeezed(turn.said)
    if text in said:
        return True
    before = _squeezed(turn.prompt)[-len(text) :]
    return any(before.endswith(text[:at]) and said.startswith(text[at:]) for at in range(1, len(text)))


def _refuse_unwritten_call(talk: TemplatedRow, turn: RenderedTurn, number: int) -> None:
    message, mark = talk.messages[turn.index], _mark(turn.text)
    calls = [*message["tool_calls"]]
    function = calls[number]["function"]
    more = {"name": function["name"] + mark, "arguments": function["arguments"] | {mark: mark}}
    calls[number] = calls[number] | {"function": function | more}
    said, _ = _said_instead(talk, turn, message | {"tool_calls": calls})
    if said.count(mark) < 3 or function["name"] not in turn.said:
        raise RowError(
            f"the chat template leaves out a tool call of an answer (make one call an answer, or {_REMEDY})",
            f"call {number + 1} of {talk.where(turn.index)}",
        )


def _said_instead(talk: TemplatedRow, turn: RenderedTurn, message: Message) -> tuple[str, str]:
    """What the turn would say with another message, and what would stand behind its end."""
    text = talk.answered(turn.index, message, turn.form)
    if text is None:
        return "", ""
    text, stop = talk.template.ended(text, len(turn.prompt), bool(message.get("tool_calls")))
    if stop is None:
        return "", ""
    return text[len(turn.prompt) : stop.start()], text[stop.end() :]


def _unwritten(talk: TemplatedRow, turn: RenderedTurn, field: str) -> RowError:
    what, remedy = (
        ("thinking", f"write it into the content, leave it out, or {_REMEDY}")
        if field == "thinking"
        else ("text", _REMEDY)
    )
    return RowError(
        f"the chat template does not write the {what} of an answer as it is ({remedy})", talk.where(turn.index)
    )


def _squeezed(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def _mark(text: str) -> str:
    """A word that is not in the text. Letters only, so that it is the same however a template escapes text."""
    mark = "lorakitmark"
    while mark in text:
        mark += "k"
    return mark
