"""Probes of chat templates: how one differs from others, seen in what it writes of a sample.

Published templates read the same facts in different forms: the thinking of an answer under one of several names, the
arguments of a call as an object or as JSON text, the content of an answer that only calls as an empty text or none.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple

from lorakit.data.rows import RowError

TemplateMessage = dict[str, Any]
"""A message as a template reads it."""

Write = Callable[..., str]
"""`write(messages, ask=False)`: a template's text of these messages. Raises RowError where it does not take them."""

# Letters and digits only, so that they are the same however a template escapes text.
QUESTION, ANSWER, THOUGHT, _NAME, _KEY, _VALUE = (f"lorakit{word}sample" for word in "qatnkv")
SAMPLE_ANSWER: TemplateMessage = {"role": "assistant", "content": ANSWER}
TOOL = {"type": "function", "function": {"name": "sample", "description": "A sample.", "parameters": {}}}

# First as transformers hands it in (chat_template_utils.py, _alias_reasoning_fields), or else under one name.
_THINKING_NAMES = (("thinking", "reasoning_content"), ("reasoning_content",), ("thinking",), ("reasoning",))

# None where possible; else every role that a template may know, the asking ones, or one side alone.
_ROLES_IN_PARTS = tuple(
    frozenset(roles)
    for roles in ((), ("system", "user", "assistant", "tool"), ("system", "user", "tool"), ("user",), ("assistant",))
)


class Sample(NamedTuple):
    """A conversation that ends with an answer, the prompt for it (empty where the template does not take it), and the
    text of all."""

    messages: list[TemplateMessage]
    prompt: str
    text: str


def take_samples(write: Write, answer: TemplateMessage) -> list[Sample]:
    """A conversation that ends with this answer, without and with a system prompt, as far as the template takes it. The
    errors of samples are not the user's, whose rows get their own."""
    samples = []
    for before in ([], [{"role": "system", "content": QUESTION}]):
        messages = [*before, {"role": "user", "content": QUESTION}, answer]
        try:
            text = write(messages)
        except RowError:
            continue
        try:
            prompt = write(messages[:-1], ask=True)
        except RowError:
            prompt = ""
        samples.append(Sample(messages, prompt, text))
    return samples


@dataclass(frozen=True)
class CallForm:
    """How a template wants a call's arguments (`as_text`: as JSON text), and the content of an answer that only calls:
    `empty` is put in place of its content."""

    as_text: bool
    empty: TemplateMessage

    def adapt(self, message: TemplateMessage) -> TemplateMessage:
        """The message of an answer with calls in this form."""
        if not message["content"]:
            message = {key: value for key, value in message.items() if key != "content"} | self.empty
        if not self.as_text:
            return message
        calls = []
        for call in message["tool_calls"]:
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append(call | {"function": call["function"] | {"arguments": text}})
        return message | {"tool_calls": calls}

    def sample(self) -> TemplateMessage:
        """An answer that only calls a tool."""
        call = {"type": "function", "id": "sample123", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
        return self.adapt({"role": "assistant", "content": "", "tool_calls": [call]})


def find_call_form(write: Write) -> CallForm | None:
    """The first form in which the template writes calls, and nothing of them as Python; None if there is none."""
    empty_contents: tuple[TemplateMessage, ...] = ({"content": ""}, {"content": None}, {})
    for as_text, empty in product((False, True), empty_contents):
        form = CallForm(as_text, empty)
        for _, prompt, text in take_samples(write, form.sample()):
            answer = text.removeprefix(prompt)
            python = str({_KEY: _VALUE}) in answer or "'arguments'" in answer or "None" in answer
            if _NAME in answer and _KEY in answer and _VALUE in answer and not python:
                return form
    return None


def find_thinking_names(write: Write, answer: TemplateMessage) -> tuple[str, ...]:
    """The names under which the template reads the thinking of a sample and writes it once; none if it never does."""
    for names in _THINKING_NAMES:
        samples = take_samples(write, answer | dict.fromkeys(names, THOUGHT))
        if any(sample.text.count(THOUGHT) == 1 for sample in samples):
            return names
    return ()


def find_stops(samples: list[Sample], calls: bool, ends: frozenset[str], special: re.Pattern[str]) -> frozenset[str]:
    """The known ends, and the special token with which the template ends an answer (a call, where the samples end with
    `calls`) if it writes none of these. After a call's arguments stand first the tokens that close the call itself."""
    text = samples[0].text if samples else ""
    words = special.findall(text.rpartition(_VALUE)[2] if calls else text.partition(ANSWER)[2])
    return ends if ends & set(words) else ends | set(words[-1:] if calls else words[:1])


def find_following_stop(write: Write, samples: list[Sample], calls: bool, stop: re.Pattern[str]) -> str:
    """What stands after an answer, or after a call, up to a stop that belongs to what follows.

    GLM 4 ends nothing: it stops at the header of the next message, <|user|> or <|observation|>.
    """
    next_message = {
        "role": "tool" if calls else "user",
        "content": QUESTION,
        "name": _NAME,
        "tool_call_id": "sample123",
    }
    for messages, _, text in samples:
        try:
            longer = write([*messages, next_message])
        except RowError:
            continue
        after = longer.removeprefix(text)
        end = stop.match(after.lstrip())
        if end and after != longer:
            return after[: len(after) - len(after.lstrip()) + end.end()]
    return ""


def find_frame(samples: list[Sample], stop: re.Pattern[str], following: str, tail: str) -> tuple[str, str]:
    """What the template writes before and after the text of an answer, between the prompt without its `tail` and the
    stop. `following`: what stands after the whole text."""
    for _, prompt, text in samples:
        start = len(prompt.removesuffix(tail))
        end = stop.search(text + following, start)
        if end and text.startswith(prompt.removesuffix(tail)):
            before, answer, after = text[start : end.start()].partition(ANSWER)
            if answer:
                return before, after
    return "", ""


def find_roles_in_parts(write: Write) -> frozenset[str]:
    """The roles whose content the template writes only as a list of parts, as templates for images and texts do: the
    first of `_ROLES_IN_PARTS` with which most samples are written whole."""

    def count_whole_samples(roles: frozenset[str]) -> int:
        def write_parts(messages: list[TemplateMessage], **options: Any) -> str:
            return write([as_parts(message, roles) for message in messages], **options)

        count = 0
        for messages, _, text in take_samples(write_parts, SAMPLE_ANSWER):
            contents = [message["content"] for message in messages]
            whole = all(text.count(content) >= contents.count(content) for content in contents)
            count += whole and "{'type'" not in text
        return count

    return max(_ROLES_IN_PARTS, key=count_whole_samples)


def as_parts(message: TemplateMessage, roles: frozenset[str]) -> TemplateMessage:
    """A message whose text is one part, where its role is one of `roles`."""
    content = message.get("content")
    if message["role"] not in roles or not isinstance(content, str):
        return message
    return message | {"content": [{"type": "text", "text": content}]}


def common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def compile_alternation(words: Iterable[str]) -> re.Pattern[str]:
    """The longest of the words that fits, as one group: what they begin with alike is looked at once, for a tokenizer
    has thousands of them."""
    return re.compile(f"({_branches(sorted({*words} - {''})) or '(?!)'})")


def _branches(words: list[str]) -> str:
    """The expression for words in their order, none of them empty."""
    branches = []
    for _, group in groupby(words, lambda word: word[0]):
        alike = list(group)
        start = alike[0][: common_prefix_length(alike[0], alike[-1])]
        rest = [word[len(start) :] for word in alike]
        longer = _branches([word for word in rest if word])
        optional = "?" if "" in rest else ""
        branches.append(re.escape(start) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(branches)
