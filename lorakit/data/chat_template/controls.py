"""Control texts: what the model reads as marks, not as words, and no row's own text should spell: the tokenizer's
special tokens, and what the chat template itself writes around a message (added tokens, texts such as Llama 2's
`[INST]`), but for the marks of thoughts, which an answer may have."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.data.chat_template.template_probe import Write, compile_alternation
from lorakit.data.rows import Conversation, RowError, Text

_SAMPLES = ("lorakitssample", "lorakitqsample", "lorakitasample", "lorakitusample")
_MARK = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[[^\[\]\s]+\]")
_THOUGHT = re.compile(r"\W*\w*(?:think|thought|reason)", re.IGNORECASE)


@dataclass(frozen=True)
class ControlTexts:
    """What no row's own text should spell."""

    tokens: frozenset[str]  # texts that become special tokens
    written: frozenset[str]  # texts that the chat template itself writes, some of them tokens too
    front: str | None = None  # the one that begins a conversation and stands nowhere else in it

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return compile_alternation(self.tokens | self.written)

    @cached_property
    def _first_characters(self) -> list[str]:
        return sorted({word[0] for word in self.tokens | self.written})

    def spelled(self, content: Conversation | Text) -> Iterator[tuple[str, str]]:
        """Each control text that a row spells, once for each of its texts: what is wrong, and the text's name."""
        for name, text in named_texts(content):
            if any(first in text for first in self._first_characters):  # in most texts none is
                for word in dict.fromkeys(self._pattern.findall(text)):
                    what = (
                        "which this tokenizer reads as that token" if word in self.tokens else "a mark and not a word"
                    )
                    if word in self.written:
                        what += "; the chat template writes it too: this row looks templated already"
                    yield f"a text spells {word!r}, {what}", name


def named_texts(content: Conversation | Text) -> Iterator[tuple[str, str]]:
    """The texts of a row, each after its name, such as "message 2 (tool), name"."""
    if isinstance(content, Text):
        yield "text", content.text
        return
    for number, message in enumerate(content.messages, start=1):
        name = f"message {number} ({message['role']})"
        yield name, message["content"]
        for key, value in message.items() if len(message) > 2 else ():
            if key not in ("role", "content", "train"):
                yield from ((f"{name}, {key}", text) for text in _nested_texts(value))
    yield from (("tools", text) for text in _nested_texts(content.tools))


def _nested_texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value.values(), *value.keys()]
        elif isinstance(value, list):
            waiting += value


def find_control_texts(tokenizer: Any, write: Write | None) -> ControlTexts:
    """The control texts of a tokenizer and its chat template, where it has one (`write`)."""
    samples = _write_samples(write)
    around = _text_around(samples)
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    added |= dict.fromkeys(tokenizer.all_special_tokens, True)
    written = set(compile_alternation(word for word in added if word.strip()).findall(around))
    tokens = written | {word for word, special in added.items() if special and word.strip()}
    for line in around.splitlines():
        if len(_MARK.sub(" ", line).split()) <= 2:  # prose, such as the template's own system prompt, has no marks
            written.update(_MARK.findall(line))
    thoughts = {word for word in tokens | written if _THOUGHT.match(word)}
    tokens = select_single_tokens(tokenizer, tokens) - thoughts
    marks = [compile_alternation(tokens).match(text.lstrip()) for text in samples]
    fronts = {mark.group() if mark else "" for mark in marks}
    front = fronts.pop() if len(fronts) == 1 else ""
    is_front = front and all(text.count(front) == 1 for text in samples)
    return ControlTexts(frozenset(tokens), frozenset(written - thoughts), front if is_front else None)


def written_around(write: Write) -> str:
    """What a chat template writes around the texts of a conversation's messages."""
    return _text_around(_write_samples(write))


def _write_samples(write: Write | None) -> list[str]:
    """A conversation as the template writes it, with a system prompt where it takes one, and without."""
    roles, texts = ("system", "user", "assistant", "user"), []
    messages = [{"role": role, "content": text} for role, text in zip(roles, _SAMPLES, strict=True)]
    for sample in (messages, messages[1:]):
        with suppress(RowError):  # the sample is not the user's, whose rows get their own errors
            texts += [write(sample)] if write else []
    return texts


def _text_around(samples: list[str]) -> str:
    return "\n".join(re.split("|".join(_SAMPLES), samples[0])) if samples else ""


def select_single_tokens(tokenizer: Any, words: Iterable[str]) -> set[str]:
    """Those of the words that the tokenizer, when it reads them in a text, makes one token of."""
    ordered = sorted(words)
    if not ordered:
        return set()
    ids = tokenizer(ordered, add_special_tokens=False)["input_ids"]
    own_ids = tokenizer.convert_tokens_to_ids(ordered)
    return {word for word, tokens, number in zip(ordered, ids, own_ids, strict=True) if number in tokens}
