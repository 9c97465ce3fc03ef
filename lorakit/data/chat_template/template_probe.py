"""Habits by which chat templates differ, seen in what a template writes of a sample.

Published templates read the same facts in different forms: the thinking of an answer under one of several names, the
arguments of a call as an object or as JSON text, the content of an answer that only calls as an empty text or none.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product, takewhile
from typing import Any

from lorakit.data.rows import RowError

TemplateMessage = dict[str, Any]
"""A message as a template reads it."""

Write = Callable[..., str]
"""`write(messages, ask=False)`: a template's text of these messages. Raises RowError where it does not take them."""

# Letters and digits only, so that they are the same however a template escapes text.
QUESTION, ANSWER, THOUGHT, _NAME, _KEY, _VALUE = (f"lorakit{word}sample" for word in "qatnkv")

# First as transformers hands it in (chat_template_utils.py, _alias_reasoning_fields), or else under one name.
_THINKING_NAMES = (("thinking", "reasoning_content"), ("reasoning_content",), ("thinking",), ("reasoning",))

# None where it can be; else every role that a template may know, the asking ones, or one side alone.
_IN_PARTS = tuple(
    frozenset(roles)
    for roles in ((), ("system", "user", "assistant", "tool"), ("system", "user", "tool"), ("user",), ("assistant",))
)

_EMPTY_CONTENTS: tuple[TemplateMessage, ...] = ({"content": ""}, {"content": None}, {})

TOOL = {"type": "function", "function": {"name": "sample", "description": "A sample.", "parameters": {}}}


@dataclass(frozen=True)
class CallForm:
    """How a template wants a call's arguments, and the content of an answer that says nothing else."""

    as_text: bool
    empty: TemplateMessage

    def adapt(self, message: TemplateMessage) -> TemplateMessage:
        """The message of an answer with calls in this form."""
        if not message["content"]:
            message = {key: value for key, value in message.items() if key != "content"} | self.empty
        if self.as_text:
            message = message | {"tool_calls": [_with_json_text(call) for call in message["tool_calls"]]}
        return message


def find_call_form(write: Write) -> CallForm | None:
    """The first form in which the template writes calls, and nothing of them as Python; None if there is none."""
    arguments = {_KEY: _VALUE}
    for as_text, empty in product((False, True), _EMPTY_CONTENTS):
        form = CallForm(as_text, empty)
        for messages, text in render_samples(write, form.adapt(sample_call())):
            prompt = render_prompt(write, messages)
            said = text.removeprefix(prompt)
            python = str(arguments) in said or "'arguments'" in said or "None" in said
            if _NAME in said and _KEY in said and _VALUE in said and not python:
                return form
    return None


def find_thinking_names(write: Write, answer: TemplateMessage) -> tuple[str, ...]:
    """The names under which the template reads the thinking of a sample and writes it once; none if it never does."""
    for names in _THINKING_NAMES:
        thoughtful = answer | dict.fromkeys(names, THOUGHT)
        if any(text.count(THOUGHT) == 1 for _, text in render_samples(write, thoughtful)):
            return names
    return ()


def find_answer_stops(write: Write, ends: frozenset[str], special: re.Pattern[str]) -> frozenset[str]:
    """The known ends, and the special token with which the template ends an answer where it writes none of these."""
    behind = next((text.partition(ANSWER)[2] for _, text in render_samples(write, sample_answer())), "")
    found = special.findall(behind)
    return ends if ends & set(found) else ends | set(found[:1])


def find_call_stops(write: Write, form: CallForm, ends: frozenset[str], special: re.Pattern[str]) -> frozenset[str]:
    """The same for calls. Behind the arguments stand first the tokens that close the call itself, if any."""
    behind = next((text.rpartition(_VALUE)[2] for _, text in render_samples(write, form.adapt(sample_call()))), "")
    found = special.findall(behind)
    return ends if ends & set(found) else ends | set(found[-1:])


def find_following_stop(write: Write, form: CallForm | None, stop: re.Pattern[str]) -> str:
    """What stands behind an answer, or behind a call where there is a form, up to a stop that belongs to what follows.

    GLM 4 ends nothing: it stops at the header of the next message, <|user|> or <|observation|>.
    """
    answer = form.adapt(sample_call()) if form else sample_answer()
    following = {"role": "tool" if form else "user", "content": QUESTION, "name": _NAME, "tool_call_id": "sample123"}
    for messages, text in render_samples(write, answer):
        try:
            longer = write([*messages, following])
        except RowError:
            continue
        behind = longer.removeprefix(text)
        end = stop.match(behind.lstrip())
        if end and behind != longer:
            return behind[: len(behind) - len(behind.lstrip()) + end.end()]
    return ""


def find_frame(write: Write, stop: re.Pattern[str], follower: str, tail: str) -> tuple[str, str]:
    """What the template writes before and behind the text of an answer, between the prompt without its `tail` and the
    stop."""
    for messages, text in render_samples(write, sample_answer()):
        prompt = render_prompt(write, messages).removesuffix(tail)
        end = stop.search(text + follower, len(prompt))
        said = text[len(prompt) : end.start()] if end and text.startswith(prompt) else ""
        if ANSWER in said:
            before, _, behind = said.partition(ANSWER)
            return before, behind
    return "", ""


def follows_prompt(write: Write) -> bool:
    """Whether the text of an answer begins with the prompt that asks for it, wherever the template takes a sample."""
    return all(
        text.startswith(render_prompt(write, messages)) for messages, text in render_samples(write, sample_answer())
    )


def common_prefix_length(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def compile_alternation(words: frozenset[str]) -> re.Pattern[str]:
    """Any of the words, the longest that fits."""
    return re.compile(alternation(words))


def alternation(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words that fits: what they begin with alike is looked at once, for a
    tokenizer has thousands of them."""
    return _branches(sorted({*words} - {""})) or r"(?!)"


def _branches(words: list[str]) -> str:
    """The expression for words in their order, none of them empty."""
    found = []
    for _, alike in groupby(words, lambda word: word[0]):
        group = list(alike)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(group[0], group[-1], strict=False))
        start = "".join(one for one, _ in pairs)
        rest = [word[len(start) :] for word in group]
        longer = _branches([word for word in rest if word])
        optional = "?" if "" in rest else ""
        found.append(re.escape(start) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(found)


def find_roles_in_parts(write: Write) -> frozenset[str]:
    """The roles whose content the template writes only as a list of parts, as templates for images and texts do: the
    first of `_IN_PARTS` with which most samples are written whole."""
    tried = [(_whole_samples(partial(_write_parts, write, roles)), roles) for roles in _IN_PARTS]
    return max(tried, key=lambda one: one[0])[1]


def _whole_samples(write: Write) -> int:
    """How many samples are written with each of their texts, as texts."""
    return sum(
        all(text.count(message["content"]) >= times[message["content"]] for message in messages)
        for messages, text in render_samples(write, sample_answer())
        if "{'type'" not in text
        for times in [Counter(message["content"] for message in messages)]
    )


def as_parts(told: TemplateMessage, roles: frozenset[str]) -> TemplateMessage:
    """A message whose text is one part, where its role is one of `roles`."""
    content = told.get("content")
    if told["role"] not in roles or not isinstance(content, str):
        return told
    return told | {"content": [{"type": "text", "text": content}]}


def _write_parts(write: Write, roles: frozenset[str], told: list[TemplateMessage], **options: Any) -> str:
    return write([as_parts(message, roles) for message in told], **options)


def sample_answer() -> TemplateMessage:
    """An answer."""
    return {"role": "assistant", "content": ANSWER}


def sample_call() -> TemplateMessage:
    """An answer that calls a tool."""
    call = {"type": "function", "id": "sample123", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def render_samples(write: Write, answer: TemplateMessage) -> Iterator[tuple[list[TemplateMessage], str]]:
    """Conversations that end with this answer, and their text; those that the template does not take are left out."""
    question = {"role": "user", "content": QUESTION}
    for before in ([], [{"role": "system", "content": QUESTION}]):
        messages = [*before, question, answer]
        try:
            yield messages, write(messages)
        except RowError:
            continue  # the sample is not the user's: what the template makes of his rows is said of them


def render_prompt(write: Write, messages: list[TemplateMessage]) -> str:
    """The text up to where the last of these messages begins; empty where the template does not take it."""
    try:
        return write(messages[:-1], ask=True)
    except RowError:
        return ""  # as above


def _with_json_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}
