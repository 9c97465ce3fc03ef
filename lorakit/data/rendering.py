"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained.

What is trained for a turn is what the model must produce at inference: everything after the prompt that the same
template writes for the messages before it (`add_generation_prompt`), up to and with the token that ends the turn. The
stretch is found in the text that the template renders, so it is right with or without `{% generation %}` marks. Where a
template cannot be taken apart turn by turn into the same text, the row is refused with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from lorakit.data.formats import Conversation, RowError
from lorakit.errors import UserError

# Appended to an answer to see where the template puts its end. It starts with a character that no template writes.
_MARK = "\u2063mark"
_SPACE = re.compile(r"\s*")


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
    def ends(self) -> frozenset[str]:
        """The texts of the tokens at which the model is known to end an answer."""
        return frozenset(word for word in (self.tokenizer.eos_token, *self.stop_words) if word)

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Any special token, the longest that fits."""
        words = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        words |= {*self.tokenizer.all_special_tokens, *self.ends}
        longest_first = sorted(filter(None, words), key=lambda word: (-len(word), word))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def write(self, conversation: Conversation, ask: bool = False) -> str:
        """The template's text of these messages; with `ask`, up to where the next answer begins."""
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask))
        except TemplateSyntaxError as error:
            raise UserError(
                f"model.chat_template: no valid Jinja: {error.message}, line {error.lineno}. "
                "Mend the template, or write another."
            ) from error
        except TemplateError as error:
            raise RowError("the chat template refuses the conversation", str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowError("the chat template fails", f"{type(error).__name__}: {error}") from error


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
    _refuse_half_characters(text)
    last = _last_span(conversation, text, template)
    earlier = [] if template.train_on == "last" else turns[:-1]
    spans = [*(_span(conversation, index, text, template, last.stop) for index in earlier), last]
    for before, after in pairwise(spans):
        if after.start < before.end:
            raise RowError("the chat template renders two answers into one stretch of text")
    _refuse_other_ends(spans, template)
    _refuse_loose_stops(conversation, template.ends | {span.stop for span in spans})
    return Rendered(text, tuple(spans), everything=template.train_on == "all")


def _prepared(conversation: Conversation, system: str | None) -> Conversation:
    """With the recipe's system prompt where there is none, and without what follows the last answer."""
    while conversation and conversation[-1]["role"] != "assistant":
        conversation = conversation[:-1]
    if system is not None and conversation and conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    return conversation


def _last_span(conversation: Conversation, text: str, template: ChatTemplate) -> Span:
    """The last turn. Where its answer stands as given and nothing follows the token behind it, that token ends it."""
    index = len(conversation) - 1
    start = _start(conversation, index, text, template)
    found = _verbatim(text, start, conversation[index]["content"], template)
    if found and not text[found.end :].strip():
        return found
    return _measured(conversation, index, text, start, template)


def _span(conversation: Conversation, index: int, text: str, template: ChatTemplate, stop: str) -> Span:
    """An earlier turn. `stop` ends the last one and stands inside no message, so that it ends this one as well."""
    start = _start(conversation, index, text, template)
    found = _verbatim(text, start, conversation[index]["content"], template)
    if found and found.stop == stop:
        return found
    return _measured(conversation, index, text, start, template)


def _start(conversation: Conversation, index: int, text: str, template: ChatTemplate) -> int:
    """Where a turn begins: behind the prompt that asks for it, with which the text must begin."""
    turn = f"message {index + 1}"
    if all(message["role"] == "system" for message in conversation[:index]):
        raise RowError("an answer has no question before it", turn)
    prompt = template.write(conversation[:index], ask=True)
    if text.startswith(prompt):
        return len(prompt)
    at = _common(text, prompt)
    earlier = index < len(conversation) - 1
    raise RowError(
        "the chat template cannot be rendered turn by turn"
        + (
            " (train on the last turn only, data.train_on: last, or give another model.chat_template)"
            if earlier
            else " (give another model.chat_template)"
        ),
        f"before {turn} the prompt says {prompt[at : at + 40]!r} where the whole conversation says "
        f"{text[at : at + 40]!r}",
    )


def _verbatim(text: str, start: int, content: str, template: ChatTemplate) -> Span | None:
    """The turn when the answer stands at `start` as it was given, white space aside, and a special token follows."""
    content = content.strip()
    begin = _past_space(text, start)
    if not content or not text.startswith(content, begin):
        return None
    stop = template.special.match(text, _past_space(text, begin + len(content)))
    return Span(start, stop.end(), stop.group()) if stop else None


def _measured(conversation: Conversation, index: int, text: str, start: int, template: ChatTemplate) -> Span:
    """The turn, its end found by adding a mark to the answer and looking where the text changes."""
    turn = f"message {index + 1}"
    message = conversation[index]
    marked = [*conversation]
    marked[index] = {**message, "content": message["content"].rstrip() + _MARK}
    probe = template.write(marked)
    after = _common(text, probe)
    if not probe.startswith(_MARK, after):
        raise RowError("the chat template does not write the text of an answer as it is", turn)
    if after < start:
        raise RowError("the chat template writes an answer before the prompt that asks for it", turn)
    stop = template.special.match(text, _past_space(text, after))
    if stop is None:
        raise RowError(
            "nothing ends an answer: the chat template writes no special token behind it, so the model would never "
            "learn to stop (end the turn in the template with {{ eos_token }})",
            f"behind {turn} stands {text[after : after + 30]!r}",
        )
    return Span(start, stop.end(), stop.group())


def _refuse_other_ends(spans: Sequence[Span], template: ChatTemplate) -> None:
    """Turns that end in different tokens must end in such as end an answer: another one may belong to what follows,
    as a header does, and the model would not be stopped by it."""
    if len({span.stop for span in spans}) == 1:
        return
    strange = next((span.stop for span in spans if span.stop not in template.ends), None)
    if strange:
        raise RowError(
            "the chat template ends earlier answers and the last one with different tokens, of which the model does "
            "not stop at one (train on the last turn only, data.train_on: last)",
            f"{strange!r} against {spans[-1].stop!r}",
        )


def _refuse_loose_stops(conversation: Conversation, stops: frozenset[str]) -> None:
    """A stop token inside a message would end the turn there."""
    for stop in sorted(stops):
        for position, message in enumerate(conversation, start=1):
            if stop in message["content"]:
                raise RowError(
                    f"a message contains the text {stop!r}, which ends a turn of this model", f"message {position}"
                )


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "a message has half of a surrogate pair, which is no character", repr(text[error.start])
        ) from error


def _past_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


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
