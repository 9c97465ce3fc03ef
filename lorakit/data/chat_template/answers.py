"""An answer after its prompt: the forms in which a template may write it, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace

from lorakit.data.chat_template.spans import AnswerForm, RenderedTurn, TemplatedRow, TurnSpan
from lorakit.data.chat_template.template import has_thinking
from lorakit.data.chat_template.template_checks import count_given_characters, refuse_half_characters, refuse_unwritten
from lorakit.data.chat_template.template_probe import common_prefix_length
from lorakit.data.conversations import Message
from lorakit.data.rows import RowError
from lorakit.data.template_source import as_yaml


def find_turn(row: TemplatedRow, index: int) -> RenderedTurn:
    """An answer in the text that ends with it: from the end of the prompt to the first token at which the model stops.
    A RowError where the template writes it in no form that is exact."""
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
    """The change of the template's variables with which the answer is exact, in words; empty where there is none."""
    own = row.template.variables
    changes = [
        (f"leave out model.template_variables.{name}", {key: own[key] for key in own if key != name}) for name in own
    ]
    changes += [
        (f"write model.template_variables: {as_yaml(one)}", {**own, **one}) for one in row.template.reads.to_try({})
    ]
    for words, variables in changes:
        template = replace(row.template, variables=variables)
        try:
            _find_exact_turn(TemplatedRow(row.messages, row.tools, template, row.inserted), index)
        except RowError:
            continue
        return words
    return ""


def _find_exact_turn(row: TemplatedRow, index: int) -> RenderedTurn:
    message, thoughts = row.messages[index], row.template.thoughts
    if all(before["role"] == "system" for before in row.messages[:index]):
        raise RowError("an answer has no question before it", row.where(index))
    marks = (thoughts.opens, thoughts.closes) if thoughts and thoughts.opened else ()
    if any(mark and mark in message.get("begun", "") for mark in marks):
        raise RowError(
            "the given beginning of an answer has the mark of a thought, which this chat template's prompt opens "
            "itself (write the whole answer into one message)",
            row.where(index),
        )
    first_error: RowError | None = None
    for form in _forms(row, index):
        text = row.text_with(index, message, form)
        if text is None:
            continue
        try:
            turn = _find_end(row, index, text, form)
            refuse_unwritten(row, turn)
            return replace(turn, given=count_given_characters(row, turn)) if "begun" in message else turn
        except RowError as error:
            first_error = first_error or error
    if first_error:
        raise first_error
    text, prompt = row.write(index + 1), row.write(index, ask=True)
    at = common_prefix_length(text, prompt)
    raise RowError(
        "the chat template cannot be rendered turn by turn (give another model.chat_template)",
        f"before {row.where(index)} the prompt says {prompt[at : at + 40]!r} where the text with the answer says "
        f"{text[at : at + 40]!r}",
    )


def _find_end(row: TemplatedRow, index: int, text: str, form: AnswerForm) -> RenderedTurn:
    refuse_half_characters(text)
    start = len(form.prompt)
    text, stop = row.template.find_stop(text, start, bool(row.messages[index].get("tool_calls")))
    if stop is None:
        raise RowError(
            "nothing ends an answer: the chat template writes no special token after it, so the model would never "
            "learn to stop (end the turn in the template with {{ eos_token }})",
            f"{row.where(index)} ends in {text[-30:]!r}",
        )
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
    """What the template makes of the prompt once the answer stands there, where it drops something from it then.

    gpt-oss: the thoughts before a call (also those in its text) are read while it is worked on, and are gone with the
    final answer. Mistral 3: the system prompt is written into a question that is the last message only. What is dropped
    is known when leaving it out changes nothing of the text. The model writes what this text says, after the prompt
    that still has it.
    """
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


def describe_form(row: TemplatedRow, turn: RenderedTurn) -> str:
    """What the user is told of an answer without a thought whose prompt would open one; else empty."""
    thoughts = row.template.thoughts
    if _thinks(row, row.messages[turn.index]):
        return ""
    if turn.form.variables:
        return row.template.note_without_thoughts
    if thoughts and thoughts.opened and turn.form.prompt.rstrip().endswith(thoughts.opens):
        return (
            f"answers without thinking: the prompt opens a thought with {thoughts.opens}, and the model is trained to "
            f"close it at once with {thoughts.closes}"
        )
    return ""
