"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained.

What is trained for a turn is what the model must produce at inference: everything after the prompt that the same
template writes for the messages before it (`add_generation_prompt`), up to and with the token that ends the turn. The
stretch is found in the text that the template renders, so it is right with or without `{% generation %}` marks. Where a
template cannot be taken apart turn by turn into the same text, the row is refused with the reason.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from lorakit.data.formats import Conversation, RowError

# Appended to an answer to see where the template puts its end. It starts with a character that no template writes.
_MARK = "\u2063mark"


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of the text are one trained turn; its last token is `stop`."""

    start: int
    end: int
    stop: str


@dataclass(frozen=True)
class Rendered:
    """The text of a whole conversation and its trained turns, in order and apart.

    `everything`: the text before and between the turns is trained too (`train_on: all`).
    """

    text: str
    spans: tuple[Span, ...]
    everything: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered in the sandbox that transformers provides."""

    tokenizer: Any
    train_on: str = "assistant"
    system: str | None = None
    stop_words: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def special_words(self) -> tuple[str, ...]:
        """The texts of all special tokens, longest first."""
        words = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        words.update(self.tokenizer.all_special_tokens)
        words.update(self.stop_words)
        return tuple(sorted((word for word in words if word), key=lambda word: (-len(word), word)))

    def write(self, conversation: Conversation, ask: bool = False) -> str:
        """The template's text of these messages; with `ask`, up to where the next answer begins."""
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RowError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error


def render(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """The text and the trained stretches of one conversation.

    Raises:
        RowError: there is no turn to train, or the template does not allow an exact mask.
    """
    conversation = _prepared(conversation, template.system)
    turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    if not turns:
        raise RowError("no assistant message: there is nothing to train")
    text = template.write(conversation)
    chosen = turns[-1:] if template.train_on == "last" else turns
    spans = [_span(conversation, index, text, template) for index in chosen]
    for before, after in pairwise(spans):
        if after.start < before.end:
            raise RowError("the chat template renders two answers into one stretch of text")
    _refuse_loose_stops(conversation, spans)
    return Rendered(text, tuple(spans), everything=template.train_on == "all")


def _prepared(conversation: Conversation, system: str | None) -> Conversation:
    """With the recipe's system prompt where there is none, and without what follows the last answer."""
    while conversation and conversation[-1]["role"] != "assistant":
        conversation = conversation[:-1]
    if system is not None and conversation and conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    return conversation


def _span(conversation: Conversation, index: int, text: str, template: ChatTemplate) -> Span:
    turn = f"message {index + 1}"
    if index == 0 or all(message["role"] == "system" for message in conversation[:index]):
        raise RowError(f"{turn} is an answer with no question before it")
    prompt = template.write(conversation[:index], ask=True)
    if not text.startswith(prompt):
        at = _common(text, prompt)
        raise RowError(
            f"the chat template cannot be rendered turn by turn: before {turn} the prompt says "
            f"{prompt[at : at + 40]!r} where the whole conversation says {text[at : at + 40]!r}. "
            "Train on the last turn only (data.train_on: last), or give another model.chat_template"
        )
    start = len(prompt)
    after = _verbatim_end(text, start, conversation[index]["content"])
    stop = _stop_at(text, after, template) if after is not None else None
    if stop is None:
        after = _measured_end(conversation, index, text, template)
        stop = _stop_at(text, after, template)
    if stop is None or after is None:
        raise RowError(
            f"nothing ends {turn}: after the answer the chat template writes {text[after:][:30]!r}, which is no "
            "special token, so the model would never learn to stop. End the turn in the template with {{ eos_token }}"
        )
    if after < start:
        raise RowError(f"the chat template writes {turn} before the prompt that asks for it")
    end = text.index(stop, after) + len(stop)
    return Span(start, end, stop)


def _verbatim_end(text: str, start: int, content: str) -> int | None:
    """Where the answer ends when it stands at `start` as it was given, white space aside."""
    content = content.strip()
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    return begin + len(content) if content and text.startswith(content, begin) else None


def _measured_end(conversation: Conversation, index: int, text: str, template: ChatTemplate) -> int:
    """Where the answer ends, found by adding a mark to it and looking where the text changes."""
    message = conversation[index]
    marked = [*conversation]
    marked[index] = {**message, "content": message["content"].rstrip() + _MARK}
    probe = template.write(marked)
    at = _common(text, probe)
    if not probe.startswith(_MARK, at):
        raise RowError(f"the chat template does not write the text of message {index + 1} as it is")
    return at


def _stop_at(text: str, position: int, template: ChatTemplate) -> str | None:
    """The special token that stands at `position`, white space before it aside."""
    rest = text[position : position + 200].lstrip()
    return next((word for word in template.special_words if rest.startswith(word)), None)


def _refuse_loose_stops(conversation: Conversation, spans: list[Span]) -> None:
    """A stop token inside a message would end the turn there."""
    for stop in {span.stop for span in spans}:
        for position, message in enumerate(conversation, start=1):
            if stop in message["content"]:
                raise RowError(f"message {position} contains the text {stop!r}, which ends a turn of this model")


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
