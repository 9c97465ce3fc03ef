"""Control texts: what the model reads as marks, not as words, and what therefore no row's own text should spell.

The tokenizer says which texts become special tokens. Besides these, the texts of the marks that the chat template
itself writes around what a message says: added tokens that are not special, and texts such as Llama 2's `[INST]`, which
are no tokens and mean the same to the model. The marks of thoughts are left out: an answer may have them inline.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.data.chat_template.template_probe import TemplateMessage, Write, compile_alternation
from lorakit.data.conversations import Conversation, Text
from lorakit.data.rows import RowError

_SAMPLES = ("lorakitssample", "lorakitqsample", "lorakitasample", "lorakitusample")
_MARK = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[[^\[\]\s]+\]")
_THOUGHT = re.compile(r"\W*\w*(?:think|thought|reason)", re.IGNORECASE)
_LOOKS_TEMPLATED = "the chat template writes it too: this row looks templated already"


@dataclass(frozen=True)
class ControlTexts:
    """`tokens`: texts that become special tokens; `written`: texts that the chat template itself writes, some of them
    tokens too; `front`: the one that begins a conversation and stands nowhere else in it, whatever the tokenizer calls
    its beginning of sequence."""

    tokens: frozenset[str]
    written: frozenset[str]
    front: str | None = None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return compile_alternation(self.tokens | self.written)

    @cached_property
    def _firsts(self) -> tuple[str, ...]:
        return tuple(sorted({word[0] for word in self.tokens | self.written}))

    def spelled(self, said: Conversation | Text) -> Iterator[tuple[str, str]]:
        """Each control text that a row spells, once for each of its texts: what is wrong, and the text's name."""
        if isinstance(said, Text):
            yield from ((self._wrong(word), "text") for word in self._words(said.text))
            return
        for number, message in enumerate(said.messages, start=1):
            for word in self._words(message["content"]):
                yield self._wrong(word), f"message {number} ({message['role']})"
            if len(message) > 2:
                rest = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
                for key, text in _inside(rest):
                    for word in self._words(text):
                        yield self._wrong(word), f"message {number} ({message['role']}), {key}"
        for _, text in _inside({"tools": said.tools}) if said.tools else ():
            yield from ((self._wrong(word), "tools") for word in self._words(text))

    def _words(self, text: str) -> Iterable[str]:
        for first in self._firsts:
            if first in text:  # in most texts none is
                return dict.fromkeys(self._pattern.findall(text))
        return ()

    def _wrong(self, word: str) -> str:
        read = "which this tokenizer reads as that token" if word in self.tokens else "a mark and not a word"
        return f"a text spells {word!r}, {read}" + (f"; {_LOOKS_TEMPLATED}" if word in self.written else "")


def find_control_texts(
    tokenizer: Any, write: Write | None, told: Callable[[TemplateMessage], TemplateMessage]
) -> ControlTexts:
    """The control texts of a tokenizer and its chat template, where it has one (`write`)."""
    samples = _samples(write, told) if write else []
    written = "\n".join(re.split("|".join(_SAMPLES), samples[0])) if samples else ""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    added |= dict.fromkeys(tokenizer.all_special_tokens, True)
    found = set(compile_alternation(frozenset(word for word in added if word.strip())).findall(written))
    tokens = found | {word for word, special in added.items() if special and word.strip()}
    own = found | {mark for line in written.splitlines() for mark in _marks(line)}
    thoughts = {word for word in tokens | own if _THOUGHT.match(word)}
    tokens = select_single_tokens(tokenizer, tokens) - thoughts
    return ControlTexts(
        frozenset(tokens), frozenset(own - thoughts), _front(samples, compile_alternation(frozenset(tokens)))
    )


def select_single_tokens(tokenizer: Any, words: set[str]) -> set[str]:
    """Those of the words that the tokenizer, when it reads them in a text, makes one token of."""
    ordered = sorted(words)
    if not ordered:
        return set()
    ids = tokenizer(ordered, add_special_tokens=False)["input_ids"]
    own = tokenizer.convert_tokens_to_ids(ordered)
    return {word for word, found, number in zip(ordered, ids, own, strict=True) if number in found}


def _samples(write: Write, told: Callable[[TemplateMessage], TemplateMessage]) -> list[str]:
    """What the template writes of a conversation, without the prompt for an answer: with a system prompt first where it
    takes one, then without."""
    roles = ("system", "user", "assistant", "user")
    messages = [told({"role": role, "content": text}) for role, text in zip(roles, _SAMPLES, strict=True)]
    found = []
    for sample in (messages, messages[1:]):
        try:
            found.append(write(sample))
        except RowError:
            continue  # the sample is not the user's: what the template makes of his rows is said of them
    return found


def _front(samples: list[str], tokens: re.Pattern[str]) -> str | None:
    """The token that stands at the front of each sample and nowhere else."""
    marks = [tokens.match(text.lstrip()) for text in samples]
    found = {mark.group() if mark else "" for mark in marks}
    front = found.pop() if len(found) == 1 else ""
    return front if front and all(text.count(front) == 1 for text in samples) else None


def _marks(line: str) -> list[str]:
    """The marks of a line that has little else: prose, such as a system prompt of the template's own, has none."""
    return _MARK.findall(line) if len(_MARK.sub(" ", line).split()) <= 2 else []


def _inside(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text inside nested values, with the key under which it lies at the top."""
    for key, top in values.items():
        waiting = [top]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield key, value
            elif isinstance(value, Mapping):
                waiting += [*value.values(), *value.keys()]
            elif isinstance(value, list):
                waiting += value
