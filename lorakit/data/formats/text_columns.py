"""Rows whose columns hold texts: `alpaca`, `prompt-completion`, `question-answer`, `text` and `classification`."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from lorakit.data.formats.columns import add_system_and_tools, filled_column, is_empty, question_and_answer, text_column
from lorakit.data.formats.messages import mark_given_beginnings, parse_if_json, parse_messages
from lorakit.data.formats.places import PlaceError, columns_in, fill_places, parse_places
from lorakit.data.rows import Conversation, RowError, Text, kind
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import Wording
from lorakit.recipe.problem import one_line, quote
from lorakit.registry import FORMATS, NamedColumns, Section

# The beginnings of a list of messages, and of SQuAD's answers, that a table holds as text.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
_SQUAD = re.compile(r"""\s*\{\s*["'](text|answer_start)["']\s*:""")

_DEFAULT_PROMPT = "Which label fits the text: {labels}? Answer with the label alone.\n\n{text}"
_Label = Annotated[str, Field(min_length=1), Wording("a name", "ham")]
_Labels = Annotated[list[_Label], Field(min_length=1), Wording("a list of at least one name", "[ham, spam]")]


@FORMATS.register("alpaca", columns=("instruction", "output"), optional=("input", "system"))
def alpaca(record: Mapping[str, Any]) -> Conversation:
    """`instruction`, optionally `input` (added below it after an empty line), and `output`."""
    prompt = text_column(record, "instruction")
    if not is_empty(record.get("input")):
        prompt = f"{prompt}\n\n{text_column(record, 'input')}"
    return question_and_answer(record, prompt, text_column(record, "output"))


@FORMATS.register("prompt-completion", columns=("prompt", "completion"), optional=("system", "tools"))
def prompt_completion(record: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion`: two texts, or two lists of messages of which those of the completion are trained."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if all(isinstance(side, str) and _MESSAGES.match(side) for side in (prompt, completion)):
        prompt, completion = parse_if_json(str(prompt), "prompt"), parse_if_json(str(completion), "completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return question_and_answer(record, text_column(record, "prompt"), text_column(record, "completion"))
    given, answers = parse_messages(prompt, "prompt"), parse_messages(completion, "completion")
    if all(message["role"] != "assistant" for message in answers):
        raise RowError("the column 'completion' has no assistant message: there is nothing to train")
    given = [{**message, "train": False} if message["role"] == "assistant" else message for message in given]
    if given[-1]["role"] == answers[0]["role"] == "assistant":
        given[-1] = {"prefix": True, **given[-1]}
    return add_system_and_tools(record, mark_given_beginnings([*given, *answers]))


@FORMATS.register("question-answer", columns=("question", ("answer", "answers")), optional=("context", "system"))
def question_answer(record: Mapping[str, Any]) -> Conversation:
    """`question` and `answer` (or SQuAD's `answers`), optionally `context` (put above the question)."""
    question = text_column(record, "question")
    if not is_empty(record.get("context")):
        question = f"{text_column(record, 'context')}\n\n{question}"
    return question_and_answer(record, question, _first_answer(record))


def _first_answer(record: Mapping[str, Any]) -> str:
    """The answer; the first where there is a list of them, or SQuAD's {"text": a list, ...}."""
    column = filled_column(record, ("answer", "answers"))
    value = record.get(column)
    if isinstance(value, str) and _SQUAD.match(value):
        value = parse_if_json(value, column)
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        if not value:
            raise RowError("the row has no answer", f"the list in the column {column!r} is empty")
        if not isinstance(value[0], str):
            raise RowError(f"the first item of the column {column!r} is not a text", f"it is {kind(value[0])}")
        return value[0]
    return text_column({column: value}, column)


@FORMATS.register("text", columns=("text",), conversations=False)
def text(record: Mapping[str, Any]) -> Text:
    """`text`: a document. Every token of it is trained (continued pretraining)."""
    return Text(text_column(record, "text"))


class Classification(Section):
    """How rows of the format `classification` are asked and answered."""

    labels: _Labels | None = None
    """Every label. A text in the column `label` must be one of them, a whole number is a position in the list (from \
0); null takes any text."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """What is asked: `{text}` stands for the text, `{labels}` for the list, `{column}` for another column. Null asks \
which of the labels fits, or gives the text alone where there is no list."""


def _label_mistakes(settings: Classification) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    labels, prompt = settings.labels or [], settings.prompt
    for index, label in enumerate(labels):
        if label in labels[:index]:
            yield ("labels", index), f"{quote(label)} is there twice", "Remove one."
    if prompt is None:
        return
    try:
        names = {name for _, name in parse_places(prompt)}
    except PlaceError as error:
        yield ("prompt",), error.reason, error.remedy
        return
    if "label" in names:
        yield ("prompt",), "{label} is the answer, which the question would tell", "Write {labels} for the list."
    if "text" not in names:
        reason = "{text} is not in it, so that every row would ask the same"
        yield ("prompt",), reason, "Write {text} where the text belongs."
    if "labels" in names and not labels:
        yield ("prompt",), "there is no list of labels for {labels}", "Write labels, for example labels: [ham, spam]."


def _named_by_prompt(settings: Classification) -> NamedColumns:
    names = columns_in(settings.prompt or "") - {"labels"}
    return NamedColumns(needed=names - {"text"})


@FORMATS.register(
    "classification",
    columns=("text", "label"),
    optional=("system",),
    settings=Classification,
    mistakes=_label_mistakes,
    named=_named_by_prompt,
)
def classification(record: Mapping[str, Any], settings: Classification) -> Conversation:
    """`text` and `label`: which of the labels fits the text."""
    prompt = settings.prompt or ("{text}" if settings.labels is None else _DEFAULT_PROMPT)
    values = {**record, "text": text_column(record, "text"), "labels": ", ".join(settings.labels or ())}
    question = fill_places(prompt, values)
    return question_and_answer(record, question, _label(record.get("label"), settings.labels))


def _label(value: Any, labels: list[str] | None) -> str:
    if value is None or value == "":
        raise RowError("the column 'label' is missing or null")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("the column 'label' is neither a text nor a whole number", f"it is {kind(value)}")
    if labels is None and isinstance(value, int):
        remedy = "name the labels in their order: data.format: {classification: {labels: [...]}}"
        raise RowError(f"the column 'label' is a number, and nothing says what it stands for ({remedy})")
    if labels is None or value in labels:
        return str(value)
    reason = "a label is not in the list of labels"
    # CSV has no numbers: a text of digits is a position too, unless labels are such.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = value if any(label.isdigit() for label in labels) else int(value)
    if isinstance(value, str):
        near = nearest(value, labels)
        raise RowError(reason, one_line(repr(value)) + (f". Did you mean {near}?" if near else ""))
    if not 0 <= value < len(labels):
        raise RowError(reason, f"{one_line(str(value))}, of 0 to {len(labels) - 1}")
    return labels[value]
