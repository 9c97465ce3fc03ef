"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained.

What is trained for a turn is what the model must produce at inference: everything that the template writes for it when
it is the last turn, from the prompt that asks for it (`add_generation_prompt`) up to and with the first token at which
the model stops. Turns whose text is the same in the middle of a longer conversation share one text. Where the template
rewrites history (drops earlier thinking, ends the last turn in another way), a row becomes several texts, each with
the turns that stand in it as the model would have said them. Where that cannot be exact, the row is refused.
"""

from dataclasses import dataclass

from lorakit.data.chat_template.answers import find_turn
from lorakit.data.chat_template.renderer import REFUSES
from lorakit.data.chat_template.skeletons import shape_of, skeletons
from lorakit.data.chat_template.spans import RenderedTurn, TemplatedRow
from lorakit.data.chat_template.spans import Span as Span
from lorakit.data.chat_template.template import ChatTemplate as ChatTemplate
from lorakit.data.chat_template.template_checks import (
    refuse_half_characters,
    refuse_loose_marks,
    refuse_unwritten_tools,
)
from lorakit.data.conversations import Conversation, Message, Text
from lorakit.data.rows import RowError

# Conversations of more shapes than this are rendered in full.
_SHAPES = 1000


@dataclass(frozen=True)
class Rendered:
    """A text and its trained turns, in order and apart.

    `everything`: the text before and between the turns is trained too (`train_on: all`), but for the characters
    `skipped`, each from start to end. `opening`: token ids that stand before those of the text. `note`: what is to be
    said of how it is trained.
    """

    text: str
    spans: tuple[Span, ...]
    everything: bool = False
    skipped: tuple[tuple[int, int], ...] = ()
    opening: tuple[int, ...] = ()
    note: str = ""


def render(said: Conversation | Text, template: ChatTemplate) -> list[Rendered]:
    """The texts of one row and what of them is trained: one, or several where the template rewrites history.

    Raises:
        RowError: nothing is trained, or the template does not allow an exact mask.
        UserError: the template is no valid Jinja.
    """
    if isinstance(said, Text):
        return [_document(said.text, template)]
    messages, inserted = _prepared(template.apart(_joined(said.messages)), template.system)
    known = None if said.tools else _known(messages, template)
    return known or _in_full(TemplatedRow(messages, said.tools or None, template, inserted))


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
    for mark in template.looked_for:
        for said in contents:
            if mark in said:
                return None
    try:
        filled = [(*one.filled(contents), (), one.note) for one in known]
    except UnicodeEncodeError:
        return None
    return [Rendered(*one) for one in filled]


def _in_full_with(messages: list[Message], template: ChatTemplate) -> list[Rendered]:
    return _in_full(TemplatedRow(messages, None, template, 0))


def _in_full(talk: TemplatedRow) -> list[Rendered]:
    messages, template = talk.messages, talk.template
    trained = _trained(messages, template.train_on)
    everything = template.train_on == "all"
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    refuse_loose_marks(talk)
    try:
        turns = [find_turn(talk, index) for index in (answers if everything else trained)]
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


def _joined(messages: list[Message]) -> list[Message]:
    """With one message for a given beginning and the answer that goes on with it; `begun` is what of it is given."""
    if not any("prefix" in message for message in messages):
        return messages
    found: list[Message] = []
    for message in messages:
        if found and found[-1].get("prefix"):
            begun = found.pop()["content"]
            message = {**message, "content": begun + message["content"], "begun": begun}
        found.append(message)
    return found


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


def _blame_the_system_prompt(error: RowError, talk: TemplatedRow) -> None:
    """Say so where the template takes the conversation without its system prompt."""
    if error.reason != REFUSES or talk.messages[0]["role"] != "system":
        return
    try:
        talk.template.write(talk.adapted[1:], tools=talk.tools)
    except RowError:
        return  # the first error says it
    raise RowError("the chat template refuses a system prompt (put it into the first user message)", error.case)


def _grouped(turns: list[RenderedTurn], talk: TemplatedRow) -> list[list[RenderedTurn]]:
    """The turns that stand in one text as they do when they are the last; the last of a group has that text."""
    groups: list[list[RenderedTurn]] = []
    for turn in reversed(turns):
        group = next((group for group in groups if group[-1].text.startswith(turn.whole)), None)
        if group is None:
            groups.append([turn])
        elif turn.span.end > group[0].span.start:
            raise RowError("the chat template renders two answers into one stretch of text", talk.where(turn.index))
        else:
            group.insert(0, turn)
    return groups[::-1]


def _rendered(group: list[RenderedTurn], trained: set[int], everything: bool) -> Rendered:
    spans = tuple(turn.trained for turn in group if turn.index in trained)
    skipped = tuple((turn.span.start, turn.span.end) for turn in group if turn.index not in trained)
    note = next((turn.note for turn in group if turn.note and turn.index in trained), "")
    return Rendered(group[-1].text, spans, everything, skipped, note=note)
