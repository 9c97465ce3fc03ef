"""Probes of chat templates: how one differs from others, seen in what it writes of a sample. Templates read the
thinking of an answer under one of several names, the arguments of a call as an object or as JSON text, the content of
an answer that only calls as an empty text or none. Some drop thoughts from every text, or open one in the prompt that
the text of an answer does not have: what the model must write is then built here."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, product
from typing import Any, NamedTuple

from lorakit.data.rows import Message, RowError

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
_SETS_OF_ROLES = ("", "system user assistant tool", "system user tool", "user", "assistant")
_ROLES_IN_PARTS = tuple(frozenset(roles.split()) for roles in _SETS_OF_ROLES)

_NOTHING = re.compile("(?!)")
_MARK = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")
# A mark at the end of a prompt, and the word after it: <think>, [THINK], <|channel>thought.
_LAST_MARK = re.compile(r"([<\[][^<>\[\]\s]+[>\]]\w*)\s*$")


class Sample(NamedTuple):
    """A conversation that ends with an answer, as a template writes it."""

    messages: list[TemplateMessage]
    prompt: str  # for the answer; empty where the template does not take it
    text: str  # of all


@dataclass(frozen=True)
class CallForm:
    """How a template wants the calls of an answer."""

    as_text: bool  # their arguments as JSON text
    empty: TemplateMessage  # in place of the content of an answer that only calls

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


@dataclass(frozen=True)
class AnswerProbe:
    """What a template writes of answers of one kind: plain ones, or ones that call a tool."""

    write: Write
    answer: TemplateMessage | None  # a sample of them; None where the template writes none
    ends: re.Pattern[str]  # the texts that are known to end an answer
    form: CallForm | None = None  # of the calls

    @cached_property
    def samples(self) -> list[Sample]:
        """Conversations that end with the answer, without and with a system prompt, as far as the template takes
        them."""
        samples: list[Sample] = []
        if self.answer is None:
            return samples
        for before in ([], [{"role": "system", "content": QUESTION}]):
            question = [*before, {"role": "user", "content": QUESTION}]
            with suppress(RowError):
                text, prompt = self.write([*question, self.answer]), ""
                with suppress(RowError):
                    prompt = self.write(question, ask=True)
                samples.append(Sample([*question, self.answer], prompt, text))
        return samples

    def with_answer(self, **parts: Any) -> "AnswerProbe":
        """The same with other parts of the answer."""
        return replace(self, answer={**(self.answer or {}), **parts})

    @cached_property
    def thinking_names(self) -> tuple[str, ...]:
        """The names under which the template reads an answer's thinking and writes it once; none if it never does."""
        for names in _THINKING_NAMES if self.answer else ():
            samples = self.with_answer(**dict.fromkeys(names, THOUGHT)).samples
            if any(sample.text.count(THOUGHT) == 1 for sample in samples):
                return names
        return ()

    @property
    def follows_prompts(self) -> bool:
        """Whether the text of an answer begins with the prompt for it."""
        return all(sample.text.startswith(sample.prompt) for sample in self.samples)

    def find_stops(self, ends: frozenset[str], special: re.Pattern[str]) -> frozenset[str]:
        """The known ends, and the special token with which the template ends an answer if it writes none of these.
        After a call's arguments stand first the tokens that close the call itself."""
        text = self.samples[0].text if self.samples else ""
        words = special.findall(text.rpartition(_VALUE)[2] if self.form else text.partition(ANSWER)[2])
        return ends if ends & set(words) else ends | set(words[-1:] if self.form else words[:1])

    @cached_property
    def following_stop(self) -> str:
        """What stands after an answer up to a stop that belongs to what follows: GLM 4 ends nothing, and stops at the
        header of the next message, <|user|> or <|observation|>."""
        role = "tool" if self.form else "user"
        next_message = {"role": role, "content": QUESTION, "name": _NAME, "tool_call_id": "sample123"}
        for messages, _, text in self.samples:
            with suppress(RowError):
                longer = self.write([*messages, next_message])
                after = longer.removeprefix(text)
                end = self.ends.match(after.lstrip())
                if end and after != longer:
                    return after[: len(after) - len(after.lstrip()) + end.end()]
        return ""

    def find_frame(self, stop: re.Pattern[str], tail: str) -> tuple[str, str]:
        """What the template writes before and after the text of an answer, between the prompt without its `tail` and
        the stop."""
        for _, prompt, text in self.samples:
            start = len(prompt.removesuffix(tail))
            end = stop.search(text + self.following_stop, start)
            if end and text.startswith(prompt.removesuffix(tail)):
                before, answer, after = text[start : end.start()].partition(ANSWER)
                if answer:
                    return before, after
        return "", ""


def probe_calls(write: Write, ends: re.Pattern[str]) -> AnswerProbe:
    """Answers that call a tool, in the first form in which the template writes calls, and nothing of them as Python."""
    empty_contents: tuple[TemplateMessage, ...] = ({"content": ""}, {"content": None}, {})
    for as_text, empty in product((False, True), empty_contents):
        form = CallForm(as_text, empty)
        call = {"type": "function", "id": "sample123", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
        sample = form.adapt({"role": "assistant", "content": "", "tool_calls": [call]})
        answers = AnswerProbe(write, sample, ends, form)
        for _, prompt, text in answers.samples:
            answer = text.removeprefix(prompt)
            python = str({_KEY: _VALUE}) in answer or "'arguments'" in answer or "None" in answer
            if _NAME in answer and _KEY in answer and _VALUE in answer and not python:
                return answers
    return AnswerProbe(write, None, ends)


def find_roles_in_parts(write: Write) -> frozenset[str]:
    """The roles whose content the template writes only as a list of parts, as templates for images and texts do: the
    first of `_ROLES_IN_PARTS` with which most samples are written whole."""

    def count_whole_samples(roles: frozenset[str]) -> int:
        count = 0
        for messages, _, text in AnswerProbe(partial(write, roles_in_parts=roles), SAMPLE_ANSWER, _NOTHING).samples:
            contents = [message["content"] for message in messages]
            whole = all(text.count(content) >= contents.count(content) for content in contents)
            count += whole and "{'type'" not in text
        return count

    return max(_ROLES_IN_PARTS, key=count_whole_samples)


def as_parts(message: TemplateMessage, roles: frozenset[str]) -> TemplateMessage:
    """A message whose text is one part, where its role is one of `roles`."""
    is_text = message["role"] in roles and isinstance(message.get("content"), str)
    return message | {"content": [{"type": "text", "text": message["content"]}]} if is_text else message


def has_thinking(message: Message) -> bool:
    """Whether an answer has thinking other than white space."""
    return bool((message.get("thinking") or "").strip())


@dataclass(frozen=True)
class ThoughtFormat:
    """How thoughts are written."""

    tail: str  # what the prompt ends with that the text of an answer lacks
    before: str  # what the model writes around a thought
    after: str
    opens: str  # the marks of a thought
    closes: str
    opened: bool  # the prompt opens a thought, which the model must close
    skips: bool = False  # the prompt has an empty thought in it, after which there is none

    def after_prompt(self, prompt: str) -> "ThoughtFormat | None":
        """The same after this prompt, which may open a thought where others do not, or the other way round; None where
        it is not known how a thought begins there."""
        mark = _LAST_MARK.search(prompt)
        opened = mark is not None and mark[1] == self.opens
        if opened == self.opened:
            return self
        if mark and opened:
            return replace(self, tail=prompt[mark.start() :], before="", opened=True)
        return replace(self, tail="", before=self.tail, opened=False) if self.tail.startswith(self.opens) else None

    def is_inside(self, message: Message) -> bool:
        """Whether the text of an answer has a thought in it; not where the beginning of the answer is given."""
        content = message["content"].lstrip()
        if not self.closes or self.closes not in content or "begun" in message:
            return False
        return self.opened or content.startswith(self.opens)

    def split(self, message: Message) -> tuple[str, Message]:
        """An answer's thought, and the answer without it."""
        bare = {key: value for key, value in message.items() if key != "thinking"} if "thinking" in message else message
        thought = (message.get("thinking") or "").strip()
        if thought or not self.is_inside(message):
            return thought, bare
        thought, _, rest = message["content"].partition(self.closes)
        return thought.strip().removeprefix(self.opens).strip(), bare | {"content": rest.lstrip()}

    def add(self, thought: str, answer: str) -> str:
        """What the model writes: a thought, and what the template writes of the answer."""
        if not thought and not self.opened:
            return answer
        closed = bool(self.closes) and answer.lstrip().startswith(self.closes)
        return self.before + thought + ("" if closed else self.after) + answer


def find_thoughts(answers: AnswerProbe, known: str) -> ThoughtFormat | None:
    """How thoughts are written, or could be; None where the template knows none. The closing mark must stand in
    `known`."""
    tail, generation = _tail_of_prompt(replace(answers, answer=SAMPLE_ANSWER))
    marks = _MARK.findall(tail)
    if len(marks) > 1 and marks[-1] in _closing_marks(marks[0]):
        return ThoughtFormat(tail, "", "", marks[0], marks[-1], opened=False, skips=True)
    around = _text_around(answers) if answers.thinking_names else _guess_closing(tail, known)
    if around is None:
        return None
    before, after = around
    opens, closes = _LAST_MARK.search(generation + before), _MARK.search(after)
    if not (opens and closes):
        return None
    opened = not before.strip() and generation.rstrip().endswith(opens[1])
    return ThoughtFormat(tail, before, after, opens[1], closes[0], opened)


def _tail_of_prompt(answers: AnswerProbe) -> tuple[str, str]:
    """What the prompt ends with that the text of an answer lacks, and all that it writes for the answer."""
    for messages, prompt, text in answers.samples:
        if not prompt:
            continue
        mark, at = _LAST_MARK.search(prompt), common_prefix_length(prompt, text)
        if mark and mark.start() < at < mark.start() + len(mark[1]):
            at = mark.start()  # <think> and </think> begin alike
        return prompt[at:], prompt[common_prefix_length(prompt, answers.write(messages[:-1])) :]
    return "", ""


def _text_around(answers: AnswerProbe) -> tuple[str, str] | None:
    """What the template writes before a thought, and between it and the rest of the answer."""
    thinking = dict.fromkeys(answers.thinking_names, THOUGHT)
    for messages, prompt, text in answers.with_answer(**thinking).samples:
        if not text.startswith(prompt) or text.count(THOUGHT) != 1:
            continue
        before, _, rest = text.removeprefix(prompt).partition(THOUGHT)
        if not answers.form:
            return before, rest.partition(ANSWER)[0]
        without = answers.write([*messages[:-1], answers.answer]).removeprefix(prompt)
        if rest.endswith(without):
            return before, rest.removesuffix(without)
    return None


def _guess_closing(tail: str, known: str) -> tuple[str, str] | None:
    """What closes the thought that a prompt opens (`tail`), where the template writes none: <think> and a line break
    are closed by a line break, </think> and an empty line (the usage recommendations of DeepSeek-R1's model card)."""
    mark = _LAST_MARK.search(tail)
    closes = next((word for word in _closing_marks(mark[1]) if word in known), None) if mark else None
    if closes is None:
        return None
    return "", f"\n{closes}\n\n" if tail.endswith("\n") else closes


def _closing_marks(opens: str) -> list[str]:
    """The marks that may close what a mark opens: </think>, [/THINK], <|END_THINKING|>."""
    pairs = (("START", "END"), ("BEGIN", "END"), ("begin", "end"), ("start", "end"))
    ends = [opens.replace(begin, end) for begin, end in pairs if begin in opens]
    return [f"{opens[0]}/{opens[1:]}", *ends]


def common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def compile_alternation(words: Iterable[str]) -> re.Pattern[str]:
    """The longest of the words that fits, as one group: what they begin with alike is looked at once, for a tokenizer
    has thousands of them."""
    return re.compile(f"({_branches(sorted({*words} - {''})) or '(?!)'})")


def _branches(words: list[str]) -> str:
    branches = []
    for _, group in groupby(words, lambda word: word[0]):
        alike = list(group)
        start = alike[0][: common_prefix_length(alike[0], alike[-1])]
        rest = [word[len(start) :] for word in alike]
        longer = _branches([word for word in rest if word])
        optional = "?" if "" in rest else ""
        branches.append(re.escape(start) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(branches)
