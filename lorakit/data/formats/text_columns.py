"""Formats of rows whose columns hold texts: `alpaca`, `prompt-completion`, `question-answer` and `text`."""

import re
from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation, Text
from lorakit.data.formats.columns import (
    add_system_and_tools,
    filled_column,
    is_empty,
    question_and_answer,
    text_column,
)
from lorakit.data.formats.messages import mark_given_beginnings, parse_if_json, parse_messages
from lorakit.data.rows import RowError, kind
from lorakit.registry import FORMATS

# The beginnings of a list of messages, and of SQuAD's answers, that a table holds as text.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
_SQUAD = re.compile(r"""\s*\{\s*["'](text|answer_start)["']\s*:""")


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
