"""Thoughts: how a model's reasoning stands before its answer, seen in what the template writes of samples.

Some templates drop thoughts from every text, or open one in the prompt that the text of an answer does not have. What
the model must write is then built here: the thought, what closes it, and the answer as the template writes it.
"""

import re
from dataclasses import dataclass, replace

from lorakit.data.chat_template.template_probe import (
    ANSWER,
    SAMPLE_ANSWER,
    THOUGHT,
    TemplateMessage,
    Write,
    common_prefix_length,
    take_samples,
)
from lorakit.data.conversations import Message

_MARK = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")
# A mark at the end of a prompt, and the word after it: <think>, [THINK], <|channel>thought.
_LAST_MARK = re.compile(r"([<\[][^<>\[\]\s]+[>\]]\w*)\s*$")


@dataclass(frozen=True)
class ThoughtFormat:
    """How thoughts are written.

    `tail`: what the prompt ends with that the text of an answer lacks. `before` and `after`: what the model
    writes around a thought. `opens` and `closes`: the marks of a thought. `opened`: the prompt opens a thought, which
    the model must close. `skips`: the prompt has an empty thought in it, after which there is none.
    """

    tail: str
    before: str
    after: str
    opens: str
    closes: str
    opened: bool
    skips: bool = False

    def after_prompt(self, prompt: str) -> "ThoughtFormat | None":
        """The same after this prompt, which may open a thought where others do not, or the other way round (after a
        tool's answer); None where it is not known how a thought begins there."""
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


def find_thoughts(write: Write, answer: TemplateMessage, names: tuple[str, ...], known: str) -> ThoughtFormat | None:
    """How thoughts are written, or could be; None where the template knows none.

    `names`: those under which the template reads the thought of an answer such as `answer`. `known`: the template's
    source and the added tokens, in which the closing mark must stand.
    """
    tail, generation = _tail_of_prompt(write)
    marks = _MARK.findall(tail)
    if len(marks) > 1 and marks[-1] in _closing_marks(marks[0]):
        return ThoughtFormat(tail, "", "", marks[0], marks[-1], opened=False, skips=True)
    around = _text_around(write, answer, names) if names else _guess_closing(tail, known)
    if around is None:
        return None
    before, after = around
    opens, closes = _LAST_MARK.search(generation + before), _MARK.search(after)
    if not (opens and closes):
        return None
    opened = not before.strip() and generation.rstrip().endswith(opens[1])
    return ThoughtFormat(tail, before, after, opens[1], closes[0], opened)


def _tail_of_prompt(write: Write) -> tuple[str, str]:
    """What the prompt ends with that the text of an answer lacks, and all that it writes for the answer to come."""
    for messages, prompt, text in take_samples(write, SAMPLE_ANSWER):
        if not prompt:
            continue
        mark, at = _LAST_MARK.search(prompt), common_prefix_length(prompt, text)
        if mark and mark.start() < at < mark.start() + len(mark[1]):
            at = mark.start()  # <think> and </think> begin alike
        return prompt[at:], prompt[common_prefix_length(prompt, write(messages[:-1])) :]
    return "", ""


def _text_around(write: Write, answer: TemplateMessage, names: tuple[str, ...]) -> tuple[str, str] | None:
    """What the template writes before a thought, and between it and the rest of the answer."""
    for messages, prompt, text in take_samples(write, answer | dict.fromkeys(names, THOUGHT)):
        if not text.startswith(prompt) or text.count(THOUGHT) != 1:
            continue
        before, _, rest = text.removeprefix(prompt).partition(THOUGHT)
        if "tool_calls" not in answer:
            return before, rest.partition(ANSWER)[0]
        without = write([*messages[:-1], answer]).removeprefix(prompt)
        if rest.endswith(without):
            return before, rest.removesuffix(without)
    return None


def _guess_closing(tail: str, known: str) -> tuple[str, str] | None:
    """What closes the thought that a prompt opens (`tail`), where the template writes none by itself.

    DeepSeek R1 and its like: <think> and a line break are closed by a line break, </think> and an empty line, as the
    model does it where it skips thinking (the usage recommendations of DeepSeek-R1's model card).
    """
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
