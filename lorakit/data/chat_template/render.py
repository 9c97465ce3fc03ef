"""Rendering: a conversation -> the chat template's text, and the stretches of it that are trained. What is trained for
a turn is what the model must produce: everything that the template writes for it when it is the last turn, from the
prompt that asks for it (`add_generation_prompt`) up to and with the first token at which the model stops. Where the
template rewrites history (drops earlier thinking, ends the last turn in another way), a row becomes several texts, each
with the turns that stand in it as the model would have written them. Where the prompt is not the beginning of the text,
the forms in which a template may write an answer are tried one after the other. Where none is exact, the row is
refused."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from lorakit.data.chat_template.skeletons import make_skeletons, shape_of
from lorakit.data.chat_template.template import REFUSED, ChatTemplate
from lorakit.data.chat_template.template_probe import common_prefix_length, has_thinking
from lorakit.data.chat_template.templated_row import AnswerForm, RenderedText, RenderedTurn, TemplatedRow, TurnSpan
from lorakit.data.rows import Conversation, Message, RowError, Text, refuse_half_characters
from lorakit.data.template_source import as_yaml

_MAX_SHAPES = 1000  # conversations of more shapes are rendered in full


def render(content: Conversation | Text, template: ChatTemplate) -> list[RenderedText]:
    """The texts of one row and what of them is trained: one, or several where the template rewrites history. A RowError
    where nothing is trained, or the template does not allow an exact mask; a UserError as of `ChatTemplate.write`."""
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
    skeletons, contents = template.skeletons.get(shape), [message["content"] for message in row.messages]
    if not skeletons:
        return None
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
    if not trained:
        last = "the last answer has train: false, and data.train_on: last trains no other"
        raise RowError(last if train_on == "last" else "every answer has train: false: there is nothing to train")
    row.refuse_loose_marks()
    try:
        turns = [_find_turn(row, index) for index in (answers if train_on == "all" else trained)]
    except RowError as error:
        if error.reason == REFUSED and messages[0]["role"] == "system" and _takes_without_system(row):
            reason = "the chat template refuses a system prompt (put it into the first user message)"
            raise RowError(reason, error.case) from error
        raise
    row.refuse_unwritten_tools(turns[0])
    groups = _group(turns, row)
    if train_on == "all" and len(groups) > 1:
        what = "the chat template writes an answer differently when it is the last, so not everything can be trained"
        raise RowError(f"{what} (write data.train_on: assistant)", row.where(groups[0][-1].index))
    return [_join_turns(group, trained, row) for group in groups]


def _render_document(text: str, template: ChatTemplate) -> RenderedText:
    end, begin = template.tokenizer.eos_token, template.beginning
    if not end:
        raise RowError("the tokenizer has no end token, with which a text must end")
    if not text.strip():
        raise RowError("the text is empty: there is nothing to train")
    inner = text if template.opening or not begin else text.removeprefix(begin)
    remedy = "take it out; where the text is a conversation with the chat template's marks in it, give its messages"
    for mark, why in ((end, "ends a text"), (begin, "is the beginning of sequence")):
        if mark and mark in (text if mark == end else inner):
            raise RowError(f"the text contains {mark!r}, which {why} of this model ({remedy})")
    refuse_half_characters(text)
    return RenderedText(text + end, (), everything=True, opening=template.opening)


def _takes_without_system(row: TemplatedRow) -> bool:
    with suppress(RowError):
        row.template.write(row.adapted[1:], tools=row.tools)
        return True
    return False


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
    spans = tuple(
        replace(turn.span, start=turn.span.start + turn.given)
        if turn.index in trained
        else replace(turn.span, trained=False)
        for turn in group
    )
    notes = (_describe_form(row, turn) for turn in group if turn.index in trained)
    return RenderedText(group[-1].text, spans, row.template.train_on == "all", note=next(filter(None, notes), ""))


def _describe_form(row: TemplatedRow, turn: RenderedTurn) -> str:
    """What the user is told of an answer without a thought whose prompt would open one; else empty."""
    thoughts, thinks = row.template.thoughts, _thinks(row, row.messages[turn.index])
    if turn.form.variables and not thinks:
        return row.template.note_without_thoughts
    if thinks or not (thoughts and thoughts.opened and turn.form.prompt.rstrip().endswith(thoughts.opens)):
        return ""
    opening = f"answers without thinking: the prompt opens a thought with {thoughts.opens}"
    return f"{opening}, and the model is trained to close it at once with {thoughts.closes}"


def _find_turn(row: TemplatedRow, index: int) -> RenderedTurn:
    """An answer in the text that ends with it, up to the first token at which the model stops. A RowError where no form
    is exact."""
    try:
        return _find_exact_turn(row, index)
    except RowError as error:
        if not row.template.seeks_remedies:
            raise
        remedies = row.template.remedies
        if error.reason not in remedies:
            remedies[error.reason] = _find_remedy(row, index)
        remedy = remedies[error.reason]
        if not remedy:
            raise
        reason = error.reason.removesuffix(")")
        reason = f"{reason}, or {remedy})" if reason != error.reason else f"{reason} ({remedy})"
        raise RowError(reason, error.case) from error


def _find_remedy(row: TemplatedRow, index: int) -> str:
    """The change of the template's variables with which the answer is exact, in words; or empty."""
    own, key = row.template.variables, "model.template_variables"
    changes = [(f"leave out {key}.{name}", {other: own[other] for other in own if other != name}) for name in own]
    changes += [(f"write {key}: {as_yaml(one)}", {**own, **one}) for one in row.template.reads.to_try({})]
    for words, variables in changes:
        template = replace(row.template, variables=variables)
        with suppress(RowError):
            _find_exact_turn(TemplatedRow(row.messages, row.tools, template, row.inserted), index)
            return words
    return ""


def _find_exact_turn(row: TemplatedRow, index: int) -> RenderedTurn:
    message, thoughts = row.messages[index], row.template.thoughts
    if all(before["role"] == "system" for before in row.messages[:index]):
        raise RowError("an answer has no question before it", row.where(index))
    marks = (thoughts.opens, thoughts.closes) if thoughts and thoughts.opened else ()
    if any(mark and mark in message.get("begun", "") for mark in marks):
        what = "the given beginning of an answer has the mark of a thought, which the prompt opens itself"
        raise RowError(f"{what} (write the whole answer into one message)", row.where(index))
    first_error: RowError | None = None
    for form in _forms(row, index):
        text = row.text_with(index, message, form)
        if text is None:
            continue
        try:
            turn = _find_end(row, index, text, form)
            row.refuse_unwritten(turn)
            return replace(turn, given=row.count_given_characters(turn)) if "begun" in message else turn
        except RowError as error:
            first_error = first_error or error
    if first_error:
        raise first_error
    text, prompt = row.write(index + 1), row.write(index, ask=True)
    at = common_prefix_length(text, prompt)
    reason = "the chat template cannot be rendered turn by turn (give another model.chat_template)"
    in_prompt, in_text = prompt[at : at + 40], text[at : at + 40]
    raise RowError(reason, f"before {row.where(index)} the prompt says {in_prompt!r}, the whole text {in_text!r}")


def _find_end(row: TemplatedRow, index: int, text: str, form: AnswerForm) -> RenderedTurn:
    refuse_half_characters(text)
    start = len(form.prompt)
    text, stop = row.template.find_stop(text, start, bool(row.messages[index].get("tool_calls")))
    if stop is None:
        what = "nothing ends an answer: the chat template writes no special token after it, so the model never stops"
        remedy = "end the turn in the template with {{ eos_token }}"
        raise RowError(f"{what} ({remedy})", f"{row.where(index)} ends in {text[-30:]!r}")
    return RenderedTurn(index, text, TurnSpan(start, stop.end(), stop.group()), form)


def _forms(row: TemplatedRow, index: int) -> Iterator[AnswerForm]:
    """How the answer may stand after its prompt, the template's own ways first."""
    template, message = row.template, row.messages[index]
    thinks = _thinks(row, message)
    if template.without_thoughts and not thinks:
        prompt = row.write(index, ask=True, variables=template.without_thoughts)
        yield AnswerForm(prompt, prompt, template.without_thoughts)
    prompt = row.write(index, ask=True)
    yield AnswerForm(prompt, prompt)
    here = template.thoughts.after_prompt(prompt) if template.thoughts else None
    if here and here.skips and thinks:
        return
    with_thought = AnswerForm(prompt, prompt.removesuffix(here.tail), {}, here) if here else None
    if with_thought and here and here.tail and not template.writes_thoughts(message):
        yield with_thought
    yield from _rewritten(row, index, prompt)
    if with_thought and here and (thinks or here.opened or here.skips):
        yield with_thought


def _thinks(row: TemplatedRow, message: Message) -> bool:
    thoughts = row.template.thoughts
    return has_thinking(message) or (thoughts is not None and thoughts.is_inside(message))


def _rewritten(row: TemplatedRow, index: int, prompt: str) -> Iterator[AnswerForm]:
    """What the template makes of the prompt once the answer stands there, where it drops something from it then:
    gpt-oss the thoughts before a call once there is a final answer, Mistral 3 the system prompt, which it writes into a
    last question only. What is dropped is known when leaving it out changes nothing of the text. The model writes this
    text after the whole prompt."""
    text, template, before = row.write(index + 1), row.template, row.messages[:index]
    if text.startswith(prompt):
        return
    shorter = []
    if any(message.get("tool_calls") or has_thinking(message) for message in before):
        silent = [message | {"content": ""} if message.get("tool_calls") else message for message in before]
        shorter.append([template.adapt(message | {"thinking": ""}) for message in silent])
    if before[0]["role"] == "system":
        shorter.append(row.adapted[1:index])
    for messages in shorter:
        if template.write([*messages, row.adapted[index]], tools=row.tools) == text:
            yield AnswerForm(prompt, template.write(messages, ask=True, tools=row.tools))
