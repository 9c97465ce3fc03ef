"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained.

What is trained for a turn is what the model must produce at inference: everything that the template writes for it when
it is the last turn, from the prompt that asks for it (`add_generation_prompt`) up to and with the first token at which
the model stops. Turns whose text is the same in the middle of a longer conversation share one text. Where the template
rewrites history (drops earlier thinking, ends the last turn in another way), a row becomes several texts, each with
the turns that stand in it as the model would have said them. Where that cannot be exact, the row is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorakit.data.conversations import Conversation, Message, Text
from lorakit.data.rendering.exactness import (
    refuse_half_characters,
    refuse_loose_marks,
    refuse_unwritten,
    refuse_unwritten_tools,
)
from lorakit.data.rendering.habits import Told
from lorakit.data.rendering.skeletons import shape_of, skeletons
from lorakit.data.rendering.template import REFUSES, thinks
from lorakit.data.rendering.template import ChatTemplate as ChatTemplate
from lorakit.data.rendering.turns import Span as Span
from lorakit.data.rendering.turns import Talk, Turn
from lorakit.data.rows import RowError

# Conversations of more shapes than this are rendered in full.
_SHAPES = 1000
# How a prompt begins a thought: <think>, <|START_THINKING|>, [THINK] and their kin.
_THOUGHT = re.compile(r"[<\[]\W*\w*think", re.IGNORECASE)


@dataclass(frozen=True)
class Rendered:
    """A text and its trained turns, in order and apart.

    `everything`: the text before and between the turns is trained too (`train_on: all`), but for the characters
    `skipped`, each from start to end. `opening`: token ids that stand before those of the text.
    """

    text: str
    spans: tuple[Span, ...]
    everything: bool = False
    skipped: tuple[tuple[int, int], ...] = ()
    opening: tuple[int, ...] = ()


def render(said: Conversation | Text, template: ChatTemplate) -> list[Rendered]:
    """The texts of one row and what of them is trained: one, or several where the template rewrites history.

    Raises:
        RowError: nothing is trained, or the template does not allow an exact mask.
        UserError: the template is no valid Jinja.
    """
    if isinstance(said, Text):
        return [_document(said.text, template)]
    messages, inserted = _prepared(said.messages, template.system)
    known = None if said.tools else _known(messages, template)
    return known or _in_full(Talk(messages, said.tools or None, template, inserted))


def _known(messages: list[Message], template: ChatTemplate) -> list[Rendered] | None:
    """The texts of a conversation whose like has been rendered; None where it must be rendered in full."""
    shape = shape_of(messages)
    if shape is None:
        return None
    if shape not in template.skeletons and len(template.skeletons) < _SHAPES:
        template.skeletons[shape] = skeletons(messages, template, _in_full_with)
    known = template.skeletons.get(shape)
    contents = [message["content"] for message in messages]
    if not known:
        return None
    for mark in template.marks:
        for said in contents:
            if mark in said:
                return None
    try:
        return [Rendered(*one.filled(contents)) for one in known]
    except UnicodeEncodeError:
        return None


def _in_full_with(messages: list[Message], template: ChatTemplate) -> list[Rendered]:
    return _in_full(Talk(messages, None, template, 0))


def _in_full(talk: Talk) -> list[Rendered]:
    messages, template = talk.messages, talk.template
    trained = _trained(messages, template.train_on)
    everything = template.train_on == "all"
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    refuse_loose_marks(talk)
    try:
        turns = [_turn(talk, index) for index in (answers if everything else trained)]
    except RowError as error:
        _blame_the_system_prompt(error, talk)
        raise
    refuse_unwritten_tools(talk, turns[0])
    groups = _grouped(turns, talk)
    if everything and len(groups) > 1:
        raise RowError(
            "the chat template writes an answer otherwise when it is the last, so not everything can be trained "
            "(write data.train_on: assistant)",
            talk.where(groups[0][-1].index),
        )
    return [_rendered(group, set(trained), everything) for group in groups]


def _document(text: str, template: ChatTemplate) -> Rendered:
    end = template.tokenizer.eos_token
    if not end:
        raise RowError("the tokenizer has no end token, with which a text must end")
    if not text.strip():
        raise RowError("the text is empty: there is nothing to train")
    if end in text:
        raise RowError(
            f"the text contains {end!r}, which ends a text of this model (make two rows of it; where it is a "
            "conversation with the chat template's marks in it, give its messages)"
        )
    begin = template.beginning
    if begin and begin in (text if template.opening else text.removeprefix(begin)):
        how = "the tokenizer writes it before each text" if template.opening else "it stands at the front alone"
        raise RowError(
            f"the text contains {begin!r}, the beginning of sequence of this model (take it out: {how}; where the text "
            "is a conversation with the chat template's marks in it, give its messages)"
        )
    refuse_half_characters(text)
    return Rendered(text + end, (), everything=True, opening=template.opening)


def _prepared(messages: list[Message], system: str | None) -> tuple[list[Message], int]:
    """With the recipe's system prompt where there is none, and without what follows the last answer."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if system is not None and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages], 1
    return messages, 0


def _trained(messages: list[Message], train_on: str) -> list[int]:
    """The positions of the answers that are trained."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant message: there is nothing to train")
    chosen = answers[-1:] if train_on == "last" else answers
    trained = [index for index in chosen if messages[index].get("train", True)]
    if not trained and train_on == "last":
        raise RowError("the last answer has train: false, and data.train_on: last trains no other")
    if not trained:
        raise RowError("every answer has train: false: there is nothing to train")
    return trained


def _turn(talk: Talk, index: int) -> Turn:
    """An answer in the text that ends with it: from behind the prompt to the first token at which the model stops."""
    if all(message["role"] == "system" for message in talk.messages[:index]):
        raise RowError("an answer has no question before it", talk.where(index))
    text, prompt, rewritten = talk.text(index + 1), talk.prompt(index), ""
    if not text.startswith(prompt):
        rewritten = _rewritten(talk, index, text)
        if not rewritten:
            raise _not_turn_by_turn(talk, index, text, prompt)
        text = prompt + text.removeprefix(rewritten)
    refuse_half_characters(text)
    text, stop = talk.template.ended(text, len(prompt), bool(talk.messages[index].get("tool_calls")))
    if stop is None:
        raise RowError(
            "nothing ends an answer: the chat template writes no special token behind it, so the model would never "
            "learn to stop (end the turn in the template with {{ eos_token }})",
            f"{talk.where(index)} ends in {text[-30:]!r}",
        )
    turn = Turn(index, prompt, text, Span(len(prompt), stop.end(), stop.group()), rewritten)
    refuse_unwritten(talk, turn)
    return turn


def _rewritten(talk: Talk, index: int, text: str) -> str:
    """What the template makes of the prompt once the answer stands there, where it drops something from it then.

    gpt-oss: the thoughts before a call are read while it is worked on, and are gone with the final answer. Mistral 3:
    the system prompt is written into a question that is the last message only. What is dropped is known when leaving
    it out changes nothing of the text. The model says what this text says, behind the prompt that still has it.
    """
    for told in _with_less(talk, index):
        if talk.template.write([*told, talk.told[index]], tools=talk.tools) == text:
            prompt = talk.template.write(told, ask=True, tools=talk.tools)
            if text.startswith(prompt):
                return prompt
    return ""


def _with_less(talk: Talk, index: int) -> Iterator[list[Told]]:
    """What stands before an answer, without earlier thoughts (also those in the text of calls), or system prompt."""
    before = talk.messages[:index]
    if any(message.get("tool_calls") or thinks(message) for message in before):
        unsaid = [message | {"content": ""} if message.get("tool_calls") else message for message in before]
        yield [talk.template.told(message | {"thinking": ""}) for message in unsaid]
    if before[0]["role"] == "system":
        yield talk.told[1:index]


def _not_turn_by_turn(talk: Talk, index: int, text: str, prompt: str) -> RowError:
    at = _common(text, prompt)
    case = (
        f"before {talk.where(index)} the prompt says {prompt[at : at + 40]!r} where the text with the answer says "
        f"{text[at : at + 40]!r}"
    )
    if _THOUGHT.search(prompt, max(at - 10, 0)):
        return RowError(
            "the chat template's prompt begins a thought that its text of the answer does not go on with (give the "
            "answer's thinking as `thinking`, leave it out, or give another model.chat_template)",
            case,
        )
    return RowError("the chat template cannot be rendered turn by turn (give another model.chat_template)", case)


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def _blame_the_system_prompt(error: RowError, talk: Talk) -> None:
    """Say so where the template takes the conversation without its system prompt."""
    if error.reason != REFUSES or talk.messages[0]["role"] != "system":
        return
    try:
        talk.template.write(talk.told[1:], tools=talk.tools)
    except RowError:
        return  # the first error says it
    raise RowError("the chat template refuses a system prompt (put it into the first user message)", error.case)


def _grouped(turns: list[Turn], talk: Talk) -> list[list[Turn]]:
    """The turns that stand in one text as they do when they are the last; the last of a group has that text."""
    groups: list[list[Turn]] = []
    for turn in reversed(turns):
        group = next((group for group in groups if group[-1].text.startswith(turn.whole)), None)
        if group is None:
            groups.append([turn])
        elif turn.span.end > group[0].span.start:
            raise RowError("the chat template renders two answers into one stretch of text", talk.where(turn.index))
        else:
            group.insert(0, turn)
    return groups[::-1]


def _rendered(group: list[Turn], trained: set[int], everything: bool) -> Rendered:
    spans = tuple(turn.span for turn in group if turn.index in trained)
    skipped = tuple((turn.span.start, turn.span.end) for turn in group if turn.index not in trained)
    return Rendered(group[-1].text, spans, everything, skipped)
