"""What rendering works on: a row's messages with its chat template, and the trained turns of the rendered text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.template_probe import TemplateMessage, ThoughtFormat
from lorakit.data.conversations import Message


@dataclass(frozen=True)
class TurnSpan:
    """Characters `start` to `end` of the text are one turn; its last token is `stop`. One that is not `trained` stands
    in a text of which everything else is."""

    start: int
    end: int
    stop: str
    trained: bool = True


@dataclass(frozen=True)
class RenderedText:
    """A text and its turns, in order and apart.

    `everything`: the text before and between the turns is trained too (`train_on: all`). `opening`: token ids that
    stand before those of the text. `note`: what the user is told of how it is trained.
    """

    text: str
    spans: tuple[TurnSpan, ...]
    everything: bool = False
    opening: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class AnswerForm:
    """How the text of an answer stands after its prompt.

    `prompt`: what the model reads. `instead`: what the template's text with the answer has in its place. `variables`:
    given to the template besides the recipe's. `thoughts`: the answer's thought is taken out of the message, and put in
    front of what the template writes.
    """

    prompt: str
    instead: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    thoughts: ThoughtFormat | None = None


@dataclass(frozen=True)
class RenderedTurn:
    """The answer at `index` of a conversation, in the text that ends with it, and its form there. `given`: how many of
    its characters are given, after which the model goes on."""

    index: int
    text: str
    span: TurnSpan
    form: AnswerForm
    given: int = 0

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
        """A message's place in the row, in words."""
        return f"message {index + 1 - self.inserted}"
