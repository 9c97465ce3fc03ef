"""How many tokens rows come to, counted without transformers: by the tokenizer's file, or estimated from characters."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.conversations import Conversation, Message, RowContent, Text, Tokens

_IGNORED = -100
# Of a longer text only so much is encoded, and the count scaled.
_ENCODED = 400_000
# Characters a token, the mean of Qwen's (152k) and Mistral's Tekken (131k) vocabularies, on documentation, Python, JSON
# and the translations of Django's messages. A vocabulary of 49k made for English (SmolLM2) comes within 7 % for ASCII,
# and takes up to three times as many tokens for other scripts.
_LETTERS, _DIGITS, _SIGNS, _OTHER = 4.5, 0.9, 2.1, 0.5
_SCRIPTS = (
    ("\u00c0-\u024f\u1e00-\u1eff", 0.7),  # Latin letters with marks: most split a word
    ("\u0400-\u052f", 2.8),
    ("\u0370-\u03ff\u1f00-\u1fff", 1.4),
    ("\u0600-\u06ff\ufb50-\ufdff\ufe70-\ufeff", 2.4),
    ("\u0590-\u05ff", 2.1),
    ("\u0900-\u0dff\u0530-\u058f\u10a0-\u10ff", 1.2),
    ("\u0e00-\u0eff", 1.8),
    ("\uac00-\ud7af\u1100-\u11ff", 1.4),
    ("\u3000-\u30ff\u3400-\u9fff\uff00-\uffef", 1.3),
)
_RUNS = tuple((re.compile(f"[{script}]+"), ratio) for script, ratio in _SCRIPTS)
_ALL_RUNS = re.compile(f"[{''.join(script for script, _ in _SCRIPTS)}]+")
_ASCII_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n"
# What a template writes around a message: ChatML, Llama 3 and Gemma 5, Mistral 3 or 4.
_AROUND_A_MESSAGE = 5
FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Shape:
    """An example in numbers: its tokens, how many of them are trained, and where its trained turns end."""

    length: int
    trained: int
    ends: tuple[int, ...] = ()
    trained_by_end: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """A text, and the characters from which to which it is trained; `everything`: all but these."""

    text: str
    spans: tuple[tuple[int, int], ...]
    everything: bool = False
    before: int = 0


@dataclass(frozen=True)
class Counter:
    """A tokenizer of the package `tokenizers`, the chat template as a function, and the special tokens by name.

    Without a tokenizer tokens are estimated; without a template, what it writes is.
    """

    tokenizer: Any = None
    write: Callable[..., str] | None = None
    special: re.Pattern[str] | None = None
    end: str = ""
    opening: int = 0

    def shapes(self, said: Sequence[tuple[RowContent, str | None]], train_on: str) -> list[list[Shape]]:
        """The examples of each row (what it says, and the system prompt for rows without one)."""
        found: list[list[Shape]] = [[] for _ in said]
        pieces: list[tuple[int, _Piece]] = []
        for row, (one, system) in enumerate(said):
            if isinstance(one, Tokens):
                found[row] = [_of_tokens(one)]
            elif isinstance(one, Text):
                pieces.append((row, _Piece(one.text + self.end, (), True, self.opening)))
            elif self.tokenizer is None or self.write is None:
                found[row] = self._roughly(_prepared(one.messages, system), train_on)
            else:
                pieces += [(row, piece) for piece in self._rendered(one, system, train_on)]
        for (row, _), shape in zip(pieces, self._counted([piece for _, piece in pieces]), strict=True):
            found[row].append(shape)
        return found

    def _counted(self, pieces: list[_Piece]) -> list[Shape]:
        if self.tokenizer is None:
            return [Shape(count, count) for count in (round(estimate(piece.text)) for piece in pieces)]
        texts = [piece.text[:_ENCODED] for piece in pieces]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [_shape(piece, encoding) for piece, encoding in zip(pieces, encoded, strict=True)]

    def _rendered(self, said: Conversation, system: str | None, train_on: str) -> list[_Piece]:
        """The texts of a conversation: several where the template writes an answer otherwise once others follow."""
        messages = _prepared(said.messages, system)
        told = [_told(message) for message in messages]
        groups: list[tuple[str, list[tuple[int, int]], list[int]]] = []
        trained = set(trained_answers(messages, train_on))
        answers = trained if train_on != "all" else {at for at, one in enumerate(messages) if _is_answer(one)}
        for index in sorted(answers, reverse=True):
            text, prompt = self._text(told[: index + 1], said.tools), self._text(told[:index], said.tools, ask=True)
            if text is None or prompt is None:
                whole = "\n".join(message["content"] for message in messages[: index + 1])
                return [_Piece(whole, ((len(whole) - len(messages[index]["content"]), len(whole)),))]
            text, start = _behind(prompt, text, messages[index]["content"])
            end = self._end_of(text, start)
            group = next((group for group in groups if group[0].startswith(text[:end])), None)
            if group is None:
                groups.append((text if train_on == "all" else text[:end], [], []))
                group = groups[-1]
            if (index in trained) != (train_on == "all"):
                group[1].insert(0, (start, end))
        return [_Piece(text, tuple(spans), train_on == "all") for text, spans, _ in reversed(groups)]

    def _text(self, told: list[Message], tools: Any, ask: bool = False) -> str | None:
        from jinja2 import TemplateError

        assert self.write is not None
        try:
            return self.write(told, tools, ask)
        except (TemplateError, *FAULTS):
            return None

    def _end_of(self, text: str, start: int) -> int:
        """Behind the special token that ends an answer: of several at the end of the text the first."""
        found = list(self.special.finditer(text, start)) if self.special else []
        while len(found) > 1 and not text[found[-2].end() : found[-1].start()].strip():
            found.pop()
        return found[-1].end() if found else len(text)

    def _roughly(self, messages: list[Message], train_on: str) -> list[Shape]:
        trained = set(trained_answers(messages, train_on))
        length, learned, ends, by_end = 0.0, 0.0, [], []
        for index, message in enumerate(messages):
            calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
            tokens = estimate(message["content"] + calls + (message.get("thinking") or "")) + _AROUND_A_MESSAGE
            length += tokens
            if index in trained or (train_on == "all" and message.get("train", True)):
                learned += tokens if train_on == "all" else tokens - _AROUND_A_MESSAGE + 1
            if index in trained:
                ends.append(round(length))
                by_end.append(round(learned))
        return [Shape(round(length), round(learned), tuple(ends), tuple(by_end))] if trained else []


def estimate(text: str) -> float:
    """About how many tokens a text comes to."""
    ascii_part = text.encode("ascii", "ignore")
    letters = len(ascii_part) - len(ascii_part.translate(None, _ASCII_LETTERS))
    digits = len(ascii_part) - len(ascii_part.translate(None, b"0123456789"))
    tokens = letters / _LETTERS + digits / _DIGITS + (len(ascii_part) - letters - digits) / _SIGNS
    if len(ascii_part) < len(text):
        beyond = len(text) - len(ascii_part)
        for runs, ratio in _RUNS:
            count = sum(map(len, runs.findall(text)))
            tokens, beyond = tokens + count / ratio, beyond - count
        tokens += beyond / _OTHER
    return tokens


def trained_answers(messages: Sequence[Message], train_on: str) -> list[int]:
    """The positions of the answers that are trained."""
    answers = [at for at, message in enumerate(messages) if _is_answer(message)]
    return [at for at in (answers[-1:] if train_on == "last" else answers) if messages[at].get("train", True)]


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _prepared(messages: list[Message], system: str | None) -> list[Message]:
    while messages and not _is_answer(messages[-1]):
        messages = messages[:-1]
    if system is not None and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _told(message: Message) -> Message:
    """A message as most templates read it: thinking under its two usual names."""
    told = {key: value for key, value in message.items() if key not in ("train", "thinking") and value is not None}
    if message.get("thinking"):
        told |= dict.fromkeys(("thinking", "reasoning_content"), message["thinking"])
    return told


def _behind(prompt: str, text: str, answer: str) -> tuple[str, int]:
    """The text of an answer behind its prompt, and where it begins there.

    Some templates write the prompt otherwise once the answer stands there: the model reads it as it was asked.
    """
    if text.startswith(prompt):
        return text, len(prompt)
    pairs = enumerate(zip(prompt, text, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(text)))
    at = text.rfind(answer) if answer else -1
    return (prompt + text[at:], len(prompt)) if at > same else (text, same)


def _of_tokens(said: Tokens) -> Shape:
    return Shape(len(said.input_ids), len(said.labels) - said.labels.count(_IGNORED))


def _shape(piece: _Piece, encoding: Any) -> Shape:
    count, text = len(encoding.ids), piece.text
    if len(text) > _ENCODED:
        scaled = len(text) / _ENCODED
        trained = 1.0 if piece.everything else sum(end - start for start, end in piece.spans) / len(text)
        return Shape(round(count * scaled), round(count * scaled * trained))
    edges = [(_before(encoding, start, text), _before(encoding, end, text)) for start, end in piece.spans]
    inside, ends, by_end = 0, [], []
    for start, end in edges:
        inside += end - start
        ends.append(end)
        by_end.append(inside)
    if piece.everything:
        return Shape(count + piece.before, count - inside)
    return Shape(count, inside, tuple(ends), tuple(by_end))


def _before(encoding: Any, at: int, text: str) -> int:
    """How many tokens stand before a character; white space may belong to none."""
    while at < len(text):
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
        at += 1
    return len(encoding.ids)
