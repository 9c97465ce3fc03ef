"""An answer after its prompt: the forms in which a template may write it, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace

from lorakit.data.chat_template.spans import AnswerForm, RenderedTurn, TemplatedRow, TurnSpan
from lorakit.data.chat_template.template import has_thinking
from lorakit.data.chat_template.template_checks import count_given_characters, refuse_half_characters, refuse_unwritten
from lorakit.data.chat_template.template_probe import TemplateMessage, common_prefix_length
from lorakit.data.rows import RowError
from lorakit.data.template_source import as_yaml


def find_turn(row: TemplatedRow, index: int) -> RenderedTurn:
    """An answer in the text that ends with it: from the end of the prompt to the first token at which the model stops.

    Raises:
        RowError: the template writes it in no form that is exact.
    """
    try:
        return _find_exact_turn(row, index)
    except RowError as error:
        remedies = row.template.remedies
        if row.template.seeks_remedies and error.reason not in remedies:
            remedies[error.reason] = next(_helpful_variables(row, index), "")
        remedy = remedies.get(error.reason) if row.template.seeks_remedies else None
        if not remedy:
            raise
        reason = error.reason.removesuffix(")")
        reason = f"{reason}, or {remedy})" if reason != error.reason else f"{reason} ({remedy})"
        raise RowError(reason, error.case) from error


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
            if "begun" in message:
                turn = replace(turn, given=count_given_characters(row, turn))
            return turn
        except RowError as error:
            first_error = first_error or error
    if first_error:
        raise first_error
    text, prompt = row.text(index), row.prompt(index)
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
    return RenderedTurn(index, text, TurnSpan(start, stop.end(), stop.group()), form, _note(row, index, form))


def _forms(row: TemplatedRow, index: int) -> Iterator[AnswerForm]:
    """How the answer may stand after its prompt, the template's own ways first."""
    template, message = row.template, row.messages[index]
    thoughts, without = template.thoughts, template.without_thoughts
    thinks = has_thinking(message) or (thoughts is not None and thoughts.is_inside(message))
    if without and not thinks:
        prompt = row.prompt(index, variables=without)
        yield AnswerForm(prompt, prompt, without)
    prompt = row.prompt(index)
    yield AnswerForm(prompt, prompt)
    here = thoughts.after_prompt(prompt) if thoughts else None
    if here and here.skips and thinks:
        return
    with_thought = AnswerForm(prompt, prompt.removesuffix(here.tail), {}, here) if here else None
    if with_thought and here and here.tail and not template.writes_thoughts(message):
        yield with_thought
    yield from _rewritten(row, index, prompt)
    if with_thought and here and (thinks or here.opened or here.skips):
        yield with_thought


def _rewritten(row: TemplatedRow, index: int, prompt: str) -> Iterator[AnswerForm]:
    """What the template makes of the prompt once the answer stands there, where it drops something from it then.

    gpt-oss: the thoughts before a call are read while it is worked on, and are gone with the final answer. Mistral 3:
    the system prompt is written into a question that is the last message only. What is dropped is known when leaving
    it out changes nothing of the text. The model writes what this text says, after the prompt that still has it.
    """
    text = row.text(index)
    if text.startswith(prompt):
        return
    for messages in _with_less(row, index):
        if row.template.write([*messages, row.adapted[index]], tools=row.tools) == text:
            yield AnswerForm(prompt, row.template.write(messages, ask=True, tools=row.tools))


def _with_less(row: TemplatedRow, index: int) -> Iterator[list[TemplateMessage]]:
    """What stands before an answer, without earlier thoughts (also those in the text of calls), or system prompt."""
    before = row.messages[:index]
    if any(message.get("tool_calls") or has_thinking(message) for message in before):
        silent = [message | {"content": ""} if message.get("tool_calls") else message for message in before]
        yield [row.template.adapt(message | {"thinking": ""}) for message in silent]
    if before[0]["role"] == "system":
        yield row.adapted[1:index]


def _note(row: TemplatedRow, index: int, form: AnswerForm) -> str:
    """What the user is told of an answer without a thought whose prompt would open one."""
    thoughts, message = row.template.thoughts, row.messages[index]
    if has_thinking(message) or (thoughts and thoughts.is_inside(message)):
        return ""
    if form.variables:
        return row.template.note_without_thoughts
    if thoughts and thoughts.opened and form.prompt.rstrip().endswith(thoughts.opens):
        return (
            f"answers without thinking: the prompt opens a thought with {thoughts.opens}, and the model is trained to "
            f"close it at once with {thoughts.closes}"
        )
    return ""


def _helpful_variables(row: TemplatedRow, index: int) -> Iterator[str]:
    """Changes of the template's variables with which an answer is exact, in words."""
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
        yield words
