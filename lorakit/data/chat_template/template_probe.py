"""Probes of chat templates: how one differs from others, seen in what it writes of a sample.

Published templates read the same facts in different forms: the thinking of an answer under one of several names, the
arguments of a call as an object or as JSON text, the content of an answer that only calls as an empty text or none.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

from lorakit.data.rows import RowError

TemplateMessage = dict[str, Any]
"""A message as a template reads it."""

Write = Callable[..., str]
"""`write(messages, ask=False)`: a template's text of these messages. Raises RowError where it does not take them."""

# Letters and digits only, so that they are the same however a template escapes text.
QUESTION, ANSWER, THOUGHT, _NAME, _KEY, _VALUE = (f"lorakit{word}sample" for word in "qatnkv")
TOOL = {"type": "function", "function": {"name": "sample", "description": "A sample.", "parameters": {}}}

# First as transformers hands it in (chat_template_utils.py, _alias_reasoning_fields), or else under one name.
_THINKING_NAMES = (("thinking", "reasoning_content"), ("reasoning_content",), ("thinking",), ("reasoning",))

# None where possible; else every role that a template may know, the asking ones, or one side alone.
_ROLES_IN_PARTS = tuple(
    frozenset(roles)
    for roles in ((), ("system", "user", "assistant", "tool"), ("system", "user", "tool"), ("user",), ("assistant",))
)


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


def find_call_form(write: Write) -> CallForm | None:
    """The first form in which the template writes calls, and nothing of them as Python; None if there is none."""
    arguments = {_KEY: _VALUE}
    empty_contents: tuple[TemplateMessage, ...] = ({"content": ""}, {"content": None}, {})
    for as_text, empty in product((False, True), empty_contents):
        form = CallForm(as_text, empty)
        for messages, text in render_samples(write, sample(form)):
            answer = text.removeprefix(render_prompt(write, messages))
            python = str(arguments) in answer or "'arguments'" in answer or "None" in answer
            if _NAME in answer and _KEY in answer and _VALUE in answer and not python:
                return form
    return None


def find_thinking_names(write: Write, answer: TemplateMessage) -> tuple[str, ...]:
    """The names under which the template reads the thinking of a sample and writes it once; none if it never does."""
    for names in _THINKING_NAMES:
        samples = render_samples(write, answer | dict.fromkeys(names, THOUGHT))
        if any(text.count(THOUGHT) == 1 for _, text in samples):
            return names
    return ()


def find_stops(write: Write, form: CallForm | None, ends: frozenset[str], special: re.Pattern[str]) -> frozenset[str]:
    """The known ends, and the special token with which the template ends an answer (a call, where there is a form) if
    it writes none of these. After a call's arguments stand first the tokens that close the call itself, if any."""
    text = next((text for _, text in render_samples(write, sample(form))), "")
    words = special.findall(text.rpartition(_VALUE)[2] if form else text.partition(ANSWER)[2])
    return ends if ends & set(words) else ends | set(words[-1:] if form else words[:1])


def find_following_stop(write: Write, form: CallForm | None, stop: re.Pattern[str]) -> str:
    """What stands after an answer, or after a call where there is a form, up to a stop that belongs to what follows.

    GLM 4 ends nothing: it stops at the header of the next message, <|user|> or <|observation|>.
    """
    next_message = {"role": "tool" if form else "user", "content": QUESTION, "name": _NAME, "tool_call_id": "sample123"}
    for messages, text in render_samples(write, sample(form)):
        try:
            longer = write([*messages, next_message])
        except RowError:
            continue
        after = longer.removeprefix(text)
        end = stop.match(after.lstrip())
        if end and after != longer:
            return after[: len(after) - len(after.lstrip()) + end.end()]
    return ""


def find_frame(write: Write, stop: re.Pattern[str], following: str, tail: str) -> tuple[str, str]:
    """What the template writes before and after the text of an answer, between the prompt without its `tail` and the
    stop. `following`: what stands after the whole text."""
    for messages, text in render_samples(write, sample()):
        prompt = render_prompt(write, messages).removesuffix(tail)
        end = stop.search(text + following, len(prompt))
        if end and text.startswith(prompt):
            before, answer, after = text[len(prompt) : end.start()].partition(ANSWER)
            if answer:
                return before, after
    return "", ""


def follows_prompt(write: Write) -> bool:
    """Whether the text of an answer begins with the prompt that asks for it, wherever the template takes a sample."""
    samples = render_samples(write, sample())
    return all(text.startswith(render_prompt(write, messages)) for messages, text in samples)


def common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def compile_alternation(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, the longest that fits."""
    return re.compile(alternation(words))


def alternation(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words that fits: what they begin with alike is looked at once, for a
    tokenizer has thousands of them."""
    return _branches(sorted({*words} - {""})) or r"(?!)"


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


def find_roles_in_parts(write: Write) -> frozenset[str]:
    """The roles whose content the template writes only as a list of parts, as templates for images and texts do: the
    first of `_ROLES_IN_PARTS` with which most samples are written whole."""

    def count_whole_samples(roles: frozenset[str]) -> int:
        count = 0
        for messages, text in render_samples(partial(_write_parts, write, roles), sample()):
            contents = [message["content"] for message in messages]
            whole = all(text.count(content) >= contents.count(content) for content in contents)
            count += whole and "{'type'" not in text
        return count

    return max(_ROLES_IN_PARTS, key=count_whole_samples)


def _write_parts(write: Write, roles: frozenset[str], messages: list[TemplateMessage], **options: Any) -> str:
    return write([as_parts(message, roles) for message in messages], **options)


def as_parts(message: TemplateMessage, roles: frozenset[str]) -> TemplateMessage:
    """A message whose text is one part, where its role is one of `roles`."""
    content = message.get("content")
    if message["role"] not in roles or not isinstance(content, str):
        return message
    return message | {"content": [{"type": "text", "text": content}]}


def sample(form: CallForm | None = None) -> TemplateMessage:
    """An answer; where there is a form, one that only calls a tool."""
    if form is None:
        return {"role": "assistant", "content": ANSWER}
    call = {"type": "function", "id": "sample123", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    return form.adapt({"role": "assistant", "content": "", "tool_calls": [call]})


def render_samples(write: Write, answer: TemplateMessage) -> Iterator[tuple[list[TemplateMessage], str]]:
    """Conversations that end with this answer, and their text; those that the template does not take are left out."""
    question = {"role": "user", "content": QUESTION}
    for before in ([], [{"role": "system", "content": QUESTION}]):
        messages = [*before, question, answer]
        try:
            yield messages, write(messages)
        except RowError:
            continue  # the sample is not the user's, whose rows get their own errors


def render_prompt(write: Write, messages: list[TemplateMessage]) -> str:
    """The text up to where the last of these messages begins; empty where the template does not take it."""
    try:
        return write(messages[:-1], ask=True)
    except RowError:
        return ""  # as above
