"""What rendering works on: a row's messages beside what the template makes of them, and one turn in its text."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.data.conversations import Message
from lorakit.data.rendering.habits import Told
from lorakit.data.rendering.template import ChatTemplate


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of the text are one trained turn; its last token is `stop`."""

    start: int
    end: int
    stop: str


@dataclass(frozen=True)
class Turn:
    """The answer at `index` of a conversation, the prompt that asks for it, and the text that ends with it.

    `rewritten`: what the template makes of the prompt once the answer stands behind it, where that is something else.
    """

    index: int
    prompt: str
    text: str
    span: Span
    rewritten: str = ""

    @property
    def said(self) -> str:
        """What the model says, without the token that ends it."""
        return self.text[self.span.start : self.span.end - len(self.span.stop)]

    @property
    def whole(self) -> str:
        """Everything up to the end of the turn."""
        return self.text[: self.span.end]


@dataclass(frozen=True)
class Talk:
    """A row's messages, of which the recipe inserted the first `inserted`."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    template: ChatTemplate
    inserted: int

    @cached_property
    def told(self) -> list[Told]:
        """The messages as the template reads them."""
        return [self.template.told(message) for message in self.messages]

    def text(self, end: int, *last: Message) -> str:
        """The template's text of the first `end` messages, and of `last` behind them."""
        return self.template.write([*self.told[:end], *map(self.template.told, last)], tools=self.tools)

    def prompt(self, end: int, changed: dict[int, Message] | None = None) -> str:
        """The template's text of the first `end` messages, up to where the next answer begins.

        `changed`: other messages in the place of some.
        """
        told = self.told[:end]
        for at, message in (changed or {}).items():
            told[at] = self.template.told(message)
        return self.template.write(told, ask=True, tools=self.tools)

    def where(self, index: int) -> str:
        return f"message {index + 1 - self.inserted}"
