"""`question-answer`: a question, perhaps about a text, and its answer."""

import re
from collections.abc import Mapping
from typing import Any

from lorakit.data.conversations import Conversation
from lorakit.data.formats.columns import add_system_and_tools, filled_column, is_empty, question_and_answer, text
from lorakit.data.formats.message import stored_as_text
from lorakit.data.rows import RowError, kind
from lorakit.registry import FORMATS

# The beginning of SQuAD's answers that a table holds as text.
_SQUAD = re.compile(r"""\s*\{\s*["'](text|answer_start)["']\s*:""")


@FORMATS.register("question-answer", columns=("question", ("answer", "answers")), optional=("context", "system"))
def question_answer(record: Mapping[str, Any]) -> Conversation:
    """`question` and `answer` (or SQuAD's `answers`), optionally `context` (put above the question)."""
    question = text(record, "question")
    if not is_empty(record.get("context")):
        question = f"{text(record, 'context')}\n\n{question}"
    return add_system_and_tools(record, question_and_answer(question, _answer(record)))


def _answer(record: Mapping[str, Any]) -> str:
    """The answer; the first where there is a list of them, or SQuAD's {"text": a list, ...}."""
    column = filled_column(record, ("answer", "answers"))
    value = record.get(column)
    if isinstance(value, str) and _SQUAD.match(value):
        value = stored_as_text(value, column)
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        if not value:
            raise RowError("the row has no answer", f"the list in the column {column!r} is empty")
        if not isinstance(value[0], str):
            raise RowError(f"the first item of the column {column!r} is not a text", f"it is {kind(value[0])}")
        return value[0]
    return text({column: value}, column)
