"""An answer behind its prompt: the forms in which a template may write it, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace

from lorakit.data.chat_template.spans import AnswerForm, RenderedTurn, Span, TemplatedRow
from lorakit.data.chat_template.template import has_thinking
from lorakit.data.chat_template.template_checks import given_characters, refuse_half_characters, refuse_unwritten
from lorakit.data.chat_template.template_probe import TemplateMessage, common_prefix_length
from lorakit.data.rows import RowError
from lorakit.data.template_source import as_yaml


def find_turn(talk: TemplatedRow, index: int) -> RenderedTurn:
    """An answer in the text that ends with it: from behind the prompt to the first token at which the model stops.

    Raises:
        RowError: the template writes it in no form that is exact.
    """
    try:
        return _exact_turn(talk, index)
    except RowError as error:
        remedy = _variables_for(talk, index, error.reason)
        if not remedy:
            raise
        reason = error.reason.removesuffix(")")
        told = f"{reason}, or {remedy})" if reason != error.reason else f"{reason} ({remedy})"
        raise RowError(told, error.case) from error


def _exact_turn(talk: TemplatedRow, index: int) -> RenderedTurn:
    if all(message["role"] == "system" for message in talk.messages[:index]):
        raise RowError("an answer has no question before it", talk.where(index))
    _refuse_given_thought(talk, index)
    first: RowError | None = None
    for form in _forms(talk, index):
        text = talk.answered(index, talk.messages[index], form)
        if text is None:
            continue
        try:
            turn = _ended(talk, index, text, form)
            refuse_unwritten(talk, turn)
            if "begun" in talk.messages[index]:
                turn = replace(turn, given=given_characters(talk, turn))
        except RowError as error:
            first = first or error
            continue
        return turn
    raise first or _not_turn_by_turn(talk, index)


def _refuse_given_thought(talk: TemplatedRow, index: int) -> None:
    thoughts, given = talk.template.thoughts, talk.messages[index].get("begun", "")
    marks = (thoughts.opens, thoughts.closes) if thoughts and thoughts.opened else ()
    if any(mark and mark in given for mark in marks):
        raise RowError(
            "the given beginning of an answer has the mark of a thought, which this chat template's prompt opens "
            "itself (write the whole answer into one message)",
            talk.where(index),
        )


def _ended(talk: TemplatedRow, index: int, text: str, form: AnswerForm) -> RenderedTurn:
    refuse_half_characters(text)
    start = len(form.prompt)
    text, stop = talk.template.ended(text, start, bool(talk.messages[index].get("tool_calls")))
    if stop is None:
        raise RowError(
            "nothing ends an answer: the chat template writes no special token behind it, so the model would never "
            "learn to stop (end the turn in the template with {{ eos_token }})",
            f"{talk.where(index)} ends in {text[-30:]!r}",
        )
    return RenderedTurn(index, text, Span(start, stop.end(), stop.group()), form, _note(talk, index, form))


def _forms(talk: TemplatedRow, index: int) -> Iterator[AnswerForm]:
    """How the answer may stand behind its prompt, the template's own ways first."""
    template, message = talk.template, talk.messages[index]
    thoughts = template.thoughts
    inside = thoughts is not None and thoughts.inside(message)
    without = template.without_thoughts
    if without and not (inside or has_thinking(message)):
        prompt = talk.prompt(index, variables=without)
        yield AnswerForm(prompt, prompt, without)
    prompt = talk.prompt(index)
    yield AnswerForm(prompt, prompt)
    here = thoughts and thoughts.behind(prompt)
    if here and here.skips and (inside or has_thinking(message)):
        return
    ours = here and AnswerForm(prompt, prompt.removesuffix(here.tail), {}, here)
    if ours and here and here.tail and not template.writes_thoughts(message):
        yield ours
    yield from _rewritten(talk, index, prompt)
    if ours and here and (inside or has_thinking(message) or here.opened or here.skips):
        yield ours


def _rewritten(talk: TemplatedRow, index: int, prompt: str) -> Iterator[AnswerForm]:
    """What the template makes of the prompt once the answer stands there, where it drops something from it then.

    gpt-oss: the thoughts before a call are read while it is worked on, and are gone with the final answer. Mistral 3:
    the system prompt is written into a question that is the last message only. What is dropped is known when leaving
    it out changes nothing of the text. The model says what this text says, behind the prompt that still has it.
    """
    text = talk.text(index)
    if text.startswith(prompt):
        return
    for told in _with_less(talk, index):
        if talk.template.write([*told, talk.adapted[index]], tools=talk.tools) == text:
            yield AnswerForm(prompt, talk.template.write(told, ask=True, tools=talk.tools))


def _with_less(talk: TemplatedRow, index: int) -> Iterator[list[TemplateMessage]]:
    """What stands before an answer, without earlier thoughts (also those in the text of calls), or system prompt."""
    before = talk.messages[:index]
    if any(message.get("tool_calls") or has_thinking(message) for message in before):
        unsaid = [message | {"content": ""} if message.get("tool_calls") else message for message in before]
        yield [talk.template.adapt(message | {"thinking": ""}) for message in unsaid]
    if before[0]["role"] == "system":
        yield talk.adapted[1:index]


def _note(talk: TemplatedRow, index: int, form: AnswerForm) -> str:
    """What is to be said of an answer without a thought whose prompt would open one."""
    thoughts, message = talk.template.thoughts, talk.messages[index]
    if has_thinking(message) or (thoughts and thoughts.inside(message)):
        return ""
    if form.variables:
        return talk.template.note_without_thoughts
    if thoughts and thoughts.opened and form.prompt.rstrip().endswith(thoughts.opens):
        return (
            f"answers without thinking: the prompt opens a thought with {thoughts.opens}, and the model is trained to "
            f"close it at once with {thoughts.closes}"
        )
    return ""


def _variables_for(talk: TemplatedRow, index: int, reason: str) -> str:
    """A remedy: the first variable of the template with which the answer is exact. Looked for once a reason."""
    template = talk.template
    if not template.seeks_remedies:
        return ""
    if reason not in template.remedies:
        template.remedies[reason] = next(_working_variables(talk, index), "")
    return template.remedies[reason]


def _working_variables(talk: TemplatedRow, index: int) -> Iterator[str]:
    """Changes of the template's variables with which an answer is exact, in words."""
    own = talk.template.variables
    changes = [
        (f"leave out model.template_variables.{name}", {key: own[key] for key in own if key != name}) for name in own
    ]
    changes += [
        (f"write model.template_variables: {as_yaml(one)}", {**own, **one}) for one in talk.template.reads.to_try({})
    ]
    for words, variables in changes:
        changed = TemplatedRow(talk.messages, talk.tools, replace(talk.template, variables=variables), talk.inserted)
        try:
            _exact_turn(changed, index)
        except RowError:
            continue
        yield words


def _not_turn_by_turn(talk: TemplatedRow, index: int) -> RowError:
    text, prompt = talk.text(index), talk.prompt(index)
    at = common_prefix_length(text, prompt)
    case = (
        f"before {talk.where(index)} the prompt says {prompt[at : at + 40]!r} where the text with the answer says "
        f"{text[at : at + 40]!r}"
    )
    return RowError("the chat template cannot be rendered turn by turn (give another model.chat_template)", case)
