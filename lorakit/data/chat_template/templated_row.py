"""A row's messages with its chat template, the trained turns of the rendered text, and refusals of rows that the
template does not write as they are: a template that leaves something out does not say so, and whether a text is written
is seen by adding a mark to it and looking for the mark."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorakit.data.chat_template.controls import named_texts
from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.template_probe import TemplateMessage, ThoughtFormat, has_thinking
from lorakit.data.rows import Conversation, Message, RowError

_TELLING_LENGTH = 20  # a longer system prompt that stands in a prompt is there because the template wrote it
_REMEDY = "give another model.chat_template"


@dataclass(frozen=True)
class TurnSpan:
    """The characters of one turn in a text, from `start` to `end`."""

    start: int
    end: int
    stop: str  # the last token of it
    trained: bool = True  # where not, everything else of the text is


@dataclass(frozen=True)
class RenderedText:
    """A text and its turns, in order and apart."""

    text: str
    spans: tuple[TurnSpan, ...]
    everything: bool = False  # the text before and between the turns is trained too (`train_on: all`)
    opening: tuple[int, ...] = ()  # token ids that stand before those of the text
    note: str = ""  # what the user is told of how it is trained


@dataclass(frozen=True)
class AnswerForm:
    """How the text of an answer stands after its prompt."""

    prompt: str  # what the model reads
    instead: str  # what the template's text with the answer has in its place
    variables: Mapping[str, Any] = field(default_factory=dict)  # given to the template besides the recipe's
    # Where it is given, the answer's thought is taken out of the message, and put in front of what the template writes.
    thoughts: ThoughtFormat | None = None


@dataclass(frozen=True)
class RenderedTurn:
    """The answer at `index` of a conversation, in the text that ends with it, and its form there."""

    index: int
    text: str
    span: TurnSpan
    form: AnswerForm
    given: int = 0  # how many of its characters are given, after which the model goes on

    @property
    def answer(self) -> str:
        """What the model writes, without the token that ends it."""
        return self.text[self.span.start : self.span.end - len(self.span.stop)]


@dataclass
class TemplatedRow:
    """A row's messages, of which the recipe inserted the first `inserted`, and what the template makes of them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    template: ChatTemplate
    inserted: int
    _written: dict[tuple[int, bool, str], str] = field(default_factory=dict)

    @cached_property
    def adapted(self) -> list[TemplateMessage]:
        """The messages as the template reads them."""
        return [self.template.adapt(message) for message in self.messages]

    def write(self, end: int, ask: bool = False, variables: Mapping[str, Any] | None = None) -> str:
        """The template's text of the first `end` messages; with `ask`, up to where the next answer begins."""
        key = (end, ask, str(variables or ""))
        if key not in self._written:
            self._written[key] = self.template.write(self.adapted[:end], ask, self.tools, variables)
        return self._written[key]

    def text_with(self, index: int, message: Message, form: AnswerForm) -> str | None:
        """The text that ends with `message` as the answer, after its prompt; None where the template does not write it
        in this form."""
        thought = ""
        if form.thoughts:
            thought, message = form.thoughts.split(message)
        if message is self.messages[index] and not form.variables:
            text = self.write(index + 1)
        else:
            adapted = [*self.adapted[:index], self.template.adapt(message)]
            text = self.template.write(adapted, tools=self.tools, variables=form.variables)
        if not text.startswith(form.instead):
            return None
        answer = text[len(form.instead) :]
        return form.prompt + (form.thoughts.add(thought, answer) if form.thoughts else answer)

    def where(self, index: int) -> str:
        return f"message {index + 1 - self.inserted}"

    def refuse_unwritten(self, turn: RenderedTurn) -> None:
        """Refuse a turn of whose question or answer the template leaves something out. The question: the messages since
        the answer before it (that answer, where it stands directly before), and system prompts."""
        messages, message = self.messages, self.messages[turn.index]
        before = max((at for at in range(turn.index) if messages[at]["role"] == "assistant"), default=-1)
        for at in reversed(range(turn.index)):
            if at > before or at == turn.index - 1 or messages[at]["role"] == "system":
                _refuse_unwritten_question(self, turn, at)
        calls, content, thinking = message.get("tool_calls") or [], message["content"].strip(), has_thinking(message)
        start, end = self.template.frame
        answer = turn.answer
        if not calls and not thinking and len(answer) >= len(start) + len(end):
            inside = answer[len(start) : len(answer) - len(end)].strip() == content
            if inside and answer.startswith(start) and answer.endswith(end):
                return
        if thinking:
            _refuse_unwritten_text(self, turn, "thinking")
        if content or not (calls or thinking):
            _refuse_unwritten_text(self, turn, "content")
        for number in range(len(calls)):
            _refuse_unwritten_call(self, turn, number)

    def refuse_unwritten_tools(self, turn: RenderedTurn) -> None:
        """Refuse a row with tools that the template does not write into the prompt."""
        if not self.tools:
            return
        mark = _mark_for(turn.text)
        tool = {"name": mark, "description": mark, "parameters": {"type": "object", "properties": {}}}
        more = [*self.tools, {"type": "function", "function": tool}]
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self.tools]
        prompt = self.template.write(self.adapted[: turn.index], ask=True, tools=more, variables=turn.form.variables)
        if mark not in prompt or not all(name in turn.form.prompt for name in names):
            remedy = f"put them into the system prompt, leave them out, or {_REMEDY}"
            raise RowError(f"the chat template does not write the tools ({remedy})")

    def count_given_characters(self, turn: RenderedTurn) -> int:
        """How many characters of a turn are given, where its message has a given beginning. A RowError where the
        template does not write that as it is."""
        message = self.messages[turn.index]
        beginning = message["begun"]
        given = beginning.lstrip()
        if not given:
            return len(beginning) if turn.answer.startswith(beginning) else 0
        before, mark, after = turn.answer.partition(given)
        if not mark or not _without_space(after).startswith(_without_space(message["content"][len(beginning) :])):
            what = "the chat template does not write the given beginning of an answer as it is"
            raise RowError(f"{what} (write it and the rest into one message, or {_REMEDY})", self.where(turn.index))
        return len(before) + len(given)

    def refuse_loose_marks(self) -> None:
        """Refuse a row with a stop token inside a message, where it would end a turn, or a beginning of sequence."""
        texts, stops = [*named_texts(Conversation(self.messages[self.inserted :], self.tools))], self.template.stops
        for mark in sorted(self.template.marks, key=lambda mark: (mark in stops, mark)):
            why = "ends a turn" if mark in stops else "is the beginning of sequence"
            if place := next((name for name, text in texts if mark in text), ""):
                what = f"the row contains the text {mark!r}, which {why} of this model (take it out"
                remedy = "if this row looks templated already, give its texts without the chat template's marks"
                raise RowError(f"{what}; {remedy})", place)


def _refuse_unwritten_question(row: TemplatedRow, turn: RenderedTurn, index: int) -> None:
    message, prompt = row.messages[index], turn.form.prompt
    role, content = message["role"], message["content"].strip()
    if content in prompt:
        elsewhere = any(content in other["content"] for at, other in enumerate(row.messages) if at != index)
        telling = role == "system" and len(content) > _TELLING_LENGTH and not elsewhere
        if telling or role not in ("assistant", "system"):
            return
    adapted = row.adapted[: turn.index]
    adapted[index] = row.template.adapt(message | {"content": message["content"] + _mark_for(turn.text)})
    if row.template.write(adapted, ask=True, tools=row.tools, variables=turn.form.variables) == prompt:
        remedy = "put it into the first user message" if role == "system" else _REMEDY
        names = {"system": "a system prompt", "assistant": "an answer that another answer follows"}
        name = names.get(role, f"a message of role {role}")
        raise RowError(f"the chat template leaves out {name} ({remedy})", row.where(index))


def _refuse_unwritten_text(row: TemplatedRow, turn: RenderedTurn, field: str) -> None:
    """White space aside, a text of the answer must stand in the turn as it is, and it may begin with what the prompt
    wrote of it, such as <think>."""
    message, mark = row.messages[turn.index], _mark_for(turn.text)
    rendered, after = _render_instead(row, turn, message | {field: message[field].rstrip() + mark})
    if mark in after:
        reason = f"the chat template writes a token at which the model stops before the end of an answer ({_REMEDY})"
        raise RowError(reason, f"{turn.span.stop!r} in {row.where(turn.index)}")
    text, answer = _without_space(message[field]), _without_space(turn.answer)
    prompt = _without_space(turn.form.prompt)[-len(text) :]
    cuts = (at for at in range(1, len(text)) if prompt.endswith(text[:at]))
    if mark not in rendered or not (text in answer or any(answer.startswith(text[at:]) for at in cuts)):
        what, remedy = "text", _REMEDY
        if field == "thinking":
            what, remedy = "thinking", f"write it into the content, leave it out, or {_REMEDY}"
        reason = f"the chat template does not write the {what} of an answer as it is ({remedy})"
        raise RowError(reason, row.where(turn.index))


def _refuse_unwritten_call(row: TemplatedRow, turn: RenderedTurn, number: int) -> None:
    message, mark = row.messages[turn.index], _mark_for(turn.text)
    calls = [*message["tool_calls"]]
    function = calls[number]["function"]
    more = {"name": function["name"] + mark, "arguments": function["arguments"] | {mark: mark}}
    calls[number] = calls[number] | {"function": function | more}
    answer, _ = _render_instead(row, turn, message | {"tool_calls": calls})
    if answer.count(mark) < 3 or function["name"] not in turn.answer:
        reason = f"the chat template leaves out a tool call of an answer (make one call an answer, or {_REMEDY})"
        raise RowError(reason, f"call {number + 1} of {row.where(turn.index)}")


def _render_instead(row: TemplatedRow, turn: RenderedTurn, message: Message) -> tuple[str, str]:
    """What the turn would say with another message, and what would stand after its end."""
    text = row.text_with(turn.index, message, turn.form)
    if text is None:
        return "", ""
    text, stop = row.template.find_stop(text, len(turn.form.prompt), bool(message.get("tool_calls")))
    return (text[len(turn.form.prompt) : stop.start()], text[stop.end() :]) if stop else ("", "")


def _without_space(text: str) -> str:
    return "".join(text.split())


def _mark_for(text: str) -> str:
    """A word that is not in the text. Letters only, so that it is the same however a template escapes text."""
    mark = "lorakitmark"
    while mark in text:
        mark += "k"
    return mark
