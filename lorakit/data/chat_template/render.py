"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained.

What is trained for a turn is what the model must produce at inference: everything that the template writes for it when
it is the last turn, from the prompt that asks for it (`add_generation_prompt`) up to and with the first token at which
the model stops. Turns whose text is the same in the middle of a longer conversation share one text. Where the template
rewrites history (drops earlier thinking, ends the last turn in another way), a row becomes several texts, each with
the turns that stand in it as the model would have written them. Where that cannot be exact, the row is refused.
"""

from dataclasses import replace

from lorakit.data.chat_template.answers import describe_form, find_turn
from lorakit.data.chat_template.renderer import REFUSED
from lorakit.data.chat_template.skeletons import make_skeletons, shape_of
from lorakit.data.chat_template.spans import RenderedText, RenderedTurn, TemplatedRow
from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.template_checks import (
    refuse_half_characters,
    refuse_loose_marks,
    refuse_unwritten_tools,
)
from lorakit.data.conversations import Conversation, Message, Text
from lorakit.data.rows import RowError

# Conversations of more shapes than this are rendered in full.
_MAX_SHAPES = 1000


def render(content: Conversation | Text, template: ChatTemplate) -> list[RenderedText]:
    """The texts of one row and what of them is trained: one, or several where the template rewrites history.

    Raises:
        RowError: nothing is trained, or the template does not allow an exact mask.
        UserError: the template is not valid Jinja.
    """
    if isinstance(content, Text):
        return [_render_document(content.text, template)]
    row = prepare_row(content, template)
    return (None if row.tools else _fill_skeletons(row)) or render_in_full(row)


def prepare_row(content: Conversation, template: ChatTemplate) -> TemplatedRow:
    """The conversation with the recipe's system prompt where it has none, and without what follows its last answer. A
    given beginning and the answer that continues it are one message; its `begun` is what is given."""
    joined: list[Message] = []
    for message in content.messages:
        if joined and joined[-1].get("prefix"):
            start = joined.pop()["content"]
            message = {**message, "content": start + message["content"], "begun": start}
        joined.append(message)
    messages = template.separate_thoughts(joined)
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    inserted = template.system is not None and bool(messages) and messages[0]["role"] != "system"
    if inserted:
        messages = [{"role": "system", "content": template.system}, *messages]
    return TemplatedRow(messages, content.tools or None, template, int(inserted))


def _fill_skeletons(row: TemplatedRow) -> list[RenderedText] | None:
    """The texts of a conversation whose like has been rendered; None where it must be rendered in full."""
    shape, template = shape_of(row.messages), row.template
    if shape is None:
        return None
    if shape not in template.skeletons and len(template.skeletons) < _MAX_SHAPES:
        template.skeletons[shape] = make_skeletons(row, render_in_full)
    skeletons = template.skeletons.get(shape)
    if not skeletons:
        return None
    contents = [message["content"] for message in row.messages]
    for mark in template.marks_and_thoughts:
        for content in contents:
            if mark in content:
                return None
    try:
        return [skeleton.fill(contents) for skeleton in skeletons]
    except UnicodeEncodeError:
        return None


def render_in_full(row: TemplatedRow) -> list[RenderedText]:
    """The texts of a conversation, each answer of which the template writes and is checked."""
    messages, train_on = row.messages, row.template.train_on
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant message: there is nothing to train")
    candidates = answers[-1:] if train_on == "last" else answers
    trained = [index for index in candidates if messages[index].get("train", True)]
    if not trained and train_on == "last":
        raise RowError("the last answer has train: false, and data.train_on: last trains no other")
    if not trained:
        raise RowError("every answer has train: false: there is nothing to train")
    refuse_loose_marks(row)
    try:
        turns = [find_turn(row, index) for index in (answers if train_on == "all" else trained)]
    except RowError as error:
        if error.reason == REFUSED and messages[0]["role"] == "system" and _takes_without_system(row):
            reason = "the chat template refuses a system prompt (put it into the first user message)"
            raise RowError(reason, error.case) from error
        raise
    refuse_unwritten_tools(row, turns[0])
    groups = _group(turns, row)
    if train_on == "all" and len(groups) > 1:
        raise RowError(
            "the chat template writes an answer differently when it is the last, so not everything can be trained "
            "(write data.train_on: assistant)",
            row.where(groups[0][-1].index),
        )
    return [_join_turns(group, trained, row) for group in groups]


def _render_document(text: str, template: ChatTemplate) -> RenderedText:
    end, begin = template.tokenizer.eos_token, template.beginning
    if not end:
        raise RowError("the tokenizer has no end token, with which a text must end")
    if not text.strip():
        raise RowError("the text is empty: there is nothing to train")
    if end in text:
        raise RowError(
            f"the text contains {end!r}, which ends a text of this model (make two rows of it; where it is a "
            "conversation with the chat template's marks in it, give its messages)"
        )
    if begin and begin in (text if template.opening else text.removeprefix(begin)):
        how = "the tokenizer writes it before each text" if template.opening else "it stands at the front alone"
        raise RowError(
            f"the text contains {begin!r}, the beginning of sequence of this model (take it out: {how}; where the text "
            "is a conversation with the chat template's marks in it, give its messages)"
        )
    refuse_half_characters(text)
    return RenderedText(text + end, (), everything=True, opening=template.opening)


def _takes_without_system(row: TemplatedRow) -> bool:
    try:
        row.template.write(row.adapted[1:], tools=row.tools)
    except RowError:
        return False
    return True


def _group(turns: list[RenderedTurn], row: TemplatedRow) -> list[list[RenderedTurn]]:
    """The turns that stand in one text as they do when they are the last; the last of a group has that text."""
    groups: list[list[RenderedTurn]] = []
    for turn in reversed(turns):
        up_to_turn = turn.text[: turn.span.end]
        group = next((group for group in groups if group[-1].text.startswith(up_to_turn)), None)
        if group is None:
            groups.append([turn])
        elif turn.span.end > group[0].span.start:
            raise RowError("the chat template renders two answers into one stretch of text", row.where(turn.index))
        else:
            group.insert(0, turn)
    return groups[::-1]


def _join_turns(group: list[RenderedTurn], trained: list[int], row: TemplatedRow) -> RenderedText:
    spans, notes = [], []
    for turn in group:
        if turn.index in trained:
            spans.append(replace(turn.span, start=turn.span.start + turn.given))
            notes.append(describe_form(row, turn))
        else:
            spans.append(replace(turn.span, trained=False))
    note = next(filter(None, notes), "")
    return RenderedText(group[-1].text, tuple(spans), everything=row.template.train_on == "all", note=note)
