"""What rendering works on: a row's messages beside what the template makes of them, and one turn in its text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.template_probe import TemplateMessage
from lorakit.data.chat_template.thoughts import ThoughtFormat
from lorakit.data.conversations import Message


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of the text are one trained turn; its last token is `stop`."""

    start: int
    end: int
    stop: str


@dataclass(frozen=True)
class AnswerForm:
    """How the text of an answer stands behind its prompt.

    `prompt`: what the model reads. `instead`: what the template's text with the answer has in its place. `variables`:
    what the template is given besides the recipe's. `thoughts`: the answer's thought is taken out of it, and put
    in front of what the template writes.
    """

    prompt: str
    instead: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    thoughts: ThoughtFormat | None = None


@dataclass(frozen=True)
class RenderedTurn:
    """The answer at `index` of a conversation in the text that ends with it, and in which form it stands there.

    `note`: what is to be said of how it is trained. `given`: how many of its characters are given, so that the model
    goes on behind them.
    """

    index: int
    text: str
    span: Span
    form: AnswerForm
    note: str = ""
    given: int = 0

    @property
    def prompt(self) -> str:
        """What the model reads before it answers."""
        return self.form.prompt

    @property
    def trained(self) -> Span:
        """The characters that the model is to say."""
        return replace(self.span, start=self.span.start + self.given) if self.given else self.span

    @property
    def said(self) -> str:
        """What the model says, without the token that ends it."""
        return self.text[self.span.start : self.span.end - len(self.span.stop)]

    @property
    def whole(self) -> str:
        """Everything up to the end of the turn."""
        return self.text[: self.span.end]


@dataclass(frozen=True)
class TemplatedRow:
    """A row's messages, of which the recipe inserted the first `inserted`."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    template: ChatTemplate
    inserted: int

    @cached_property
    def adapted(self) -> list[TemplateMessage]:
        """The messages as the template reads them."""
        return [self.template.adapt(message) for message in self.messages]

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    @cached_property
    def _prompts(self) -> dict[tuple[int, str], str]:
        return {}

    def text(self, index: int) -> str:
        """The template's text of the messages up to and with an answer."""
        if index not in self._texts:
            self._texts[index] = self.template.write(self.adapted[: index + 1], tools=self.tools)
        return self._texts[index]

    def answered(self, index: int, message: Message, form: AnswerForm) -> str | None:
        """The text that ends with an answer, `message`, behind its prompt; None where the template does not write it
        in this form."""
        thought = ""
        if form.thoughts:
            thought, message = form.thoughts.apart(message)
        if message is self.messages[index] and not form.variables:
            text = self.text(index)
        else:
            told = [*self.adapted[:index], self.template.adapt(message)]
            text = self.template.write(told, tools=self.tools, variables=form.variables)
        if not text.startswith(form.instead):
            return None
        said = text[len(form.instead) :]
        if form.thoughts:
            said = form.thoughts.written(thought, said)
        return form.prompt + said

    def prompt(
        self, end: int, changed: dict[int, Message] | None = None, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The template's text of the first `end` messages, up to where the next answer begins.

        `changed`: other messages in the place of some.
        """
        known = (end, str(variables or ""))
        if not changed and known in self._prompts:
            return self._prompts[known]
        told = self.adapted[:end]
        for at, message in (changed or {}).items():
            told[at] = self.template.adapt(message)
        text = self.template.write(told, ask=True, tools=self.tools, variables=variables)
        if not changed:
            self._prompts[known] = text
        return text

    def where(self, index: int) -> str:
        """An answer's or question's place in the row, in words."""
        return f"message {index + 1 - self.inserted}"
