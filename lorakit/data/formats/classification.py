"""`classification`: a text and the one of a few labels that fits it."""

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Annotated, Any

from pydantic import Field

from lorakit.data.conversations import Conversation
from lorakit.data.formats.columns import question_and_answer, text_column
from lorakit.data.rows import RowError, kind
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import Wording
from lorakit.recipe.problem import one_line, quote
from lorakit.registry import FORMATS, Section

_DEFAULT_PROMPT = "Which label fits the text: {labels}? Answer with the label alone.\n\n{text}"
_Label = Annotated[str, Field(min_length=1), Wording("a name", "ham")]
_Labels = Annotated[list[_Label], Field(min_length=1), Wording("a list of at least one name", "[ham, spam]")]


class Classification(Section):
    """How rows of the format `classification` are asked and answered."""

    labels: _Labels | None = None
    """Every label. A text in the column `label` must be one of them, a whole number is a position in the list (from \
0); null takes any text."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """What is asked: `{text}` stands for the text, `{labels}` for the list. Null asks which of the labels fits, or \
gives the text alone where there is no list."""


def mistakes(settings: Classification) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """What cannot work in these settings: the key, the reason, and what to write instead."""
    labels = settings.labels or []
    for index, label in enumerate(labels):
        if label in labels[:index]:
            yield ("labels", index), f"{quote(label)} is there twice", "Remove one."
    if settings.prompt is not None:
        for reason, remedy in _prompt_mistakes(settings.prompt, bool(labels)):
            yield ("prompt",), reason, remedy


def _prompt_mistakes(prompt: str, has_labels: bool) -> Iterator[tuple[str, str]]:
    try:
        pieces = list(Formatter().parse(prompt))
    except ValueError as error:
        yield f"it cannot be read: {error}", "Write {{ and }} for braces that are meant as they are."
        return
    names = [
        name + (f"!{conversion}" if conversion else "") + (f":{how}" if how else "")
        for _, name, how, conversion in pieces
        if name is not None
    ]
    for name in names:
        if name not in ("text", "labels"):
            wrong = one_line(f"{{{name}}}")
            yield f"{wrong} is not a known placeholder", "Write {text} or {labels}, or {{ and }} for braces."
    if "text" not in names:
        yield "{text} is not in it, so that every row would ask the same", "Write {text} where the text belongs."
    if "labels" in names and not has_labels:
        yield "there is no list of labels for {labels}", "Write labels, for example labels: [ham, spam]."


@FORMATS.register(
    "classification", columns=("text", "label"), optional=("system",), settings=Classification, mistakes=mistakes
)
def classification(record: Mapping[str, Any], settings: Classification) -> Conversation:
    """`text` and `label`: which of the labels fits the text."""
    prompt = settings.prompt or ("{text}" if settings.labels is None else _DEFAULT_PROMPT)
    question = prompt.format(text=text_column(record, "text"), labels=", ".join(settings.labels or ()))
    return question_and_answer(record, question, _label(record.get("label"), settings.labels))


def _label(value: Any, labels: list[str] | None) -> str:
    if value is None or value == "":
        raise RowError("the column 'label' is missing or null")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("the column 'label' is neither a text nor a whole number", f"it is {kind(value)}")
    if labels is None and isinstance(value, int):
        raise RowError(
            "the column 'label' is a number, and nothing says what it stands for (name the labels in their order: "
            "data.format: {classification: {labels: [...]}})"
        )
    if labels is None or value in labels:
        return str(value)
    position = value if isinstance(value, int) else None
    # CSV has no numbers: a text of digits is a position too, unless labels are such.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        position = None if any(label.isdigit() for label in labels) else int(value)
    if position is None:
        near = nearest(value, labels) if isinstance(value, str) else None
        raise RowError(
            "a label is not in the list of labels", one_line(repr(value)) + (f". Did you mean {near}?" if near else "")
        )
    if not 0 <= position < len(labels):
        raise RowError("a label is not in the list of labels", f"{one_line(str(position))}, of 0 to {len(labels) - 1}")
    return labels[position]
