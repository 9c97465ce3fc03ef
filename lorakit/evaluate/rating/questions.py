"""Questions to put to models: a file -> prompts, each with a reference answer where the file has one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.conversations import Conversation, Message
from lorakit.data.formats import parse_record
from lorakit.data.formats.columns import is_empty
from lorakit.data.readers import read_file
from lorakit.data.readers.text_stream import TextStream, decode_lines, read_whole_lines
from lorakit.data.rows import RowError, kind
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line, show_path

# The column that tells a row's format; the format; the columns for its answer, which a question may go without.
_FORMATS = {
    "messages": ("messages", ()),
    "conversations": ("sharegpt", ()),
    "question": ("question-answer", ("answer", "answers")),
    "prompt": ("prompt-completion", ("completion",)),
    "instruction": ("alpaca", ("output",)),
}
_OPEN = "\0"
"""Stands for the answer while a row that has none is read: a format asks for one."""


@dataclass(frozen=True)
class Question:
    """`messages` as a model is given them, the last by the user; `reference` a good answer, where one is known."""

    id: str
    messages: list[Message]
    reference: str | None = None


def read_questions(path: Path) -> list[Question]:
    """The questions of a file: each line of a `.txt`, else each row, with or without its answer.

    Rows are those of the formats messages, sharegpt, question-answer, prompt-completion and alpaca. A question's id is
    what the row has in the column `id`, else its number, from 1.

    Raises:
        UserError: the file cannot be read or has no questions, a row is no question, or two have one id. It names the
            line.
    """
    found: dict[str, tuple[str, Question]] = {}
    rows = _lines(path) if path.name.endswith(".txt") else _rows(path)
    for number, (where, record) in enumerate(rows, start=1):
        try:
            question = _question(record, str(number))
        except RowError as error:
            raise UserError(f"{where}: {error}.") from error
        if question.id in found:
            raise UserError(
                f"{where}: the id {one_line(repr(question.id))} is that of {found[question.id][0]} too. Write another."
            )
        found[question.id] = where, question
    if not found:
        raise UserError(f"{show_path(path)}: the file has no questions. Write one a line, or rows with `question`.")
    return [question for _, question in found.values()]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    name = show_path(path)
    try:
        with path.open("rb") as file:
            for lines in read_whole_lines(TextStream(name, file, "", ".txt")):
                # Not splitlines, which also breaks at characters that editors show within a line.
                for line, text in enumerate(decode_lines(name, lines).split("\n"), start=lines.first):
                    if text.strip():
                        yield f"{name}:{line}", {"question": text.strip()}
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such file.") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}.") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in read_file(path):
        if isinstance(row.record, RowError):
            raise UserError(f"{row.where}: {row.record}.")
        yield row.where, row.record


def _question(record: Mapping[str, Any], number: str) -> Question:
    column = next((column for column in _FORMATS if not is_empty(record.get(column))), None)
    if column is None:
        raise RowError(f"the row has none of the columns {', '.join(_FORMATS)}: it asks nothing")
    format_name, answers = _FORMATS[column]
    if answers and all(is_empty(record.get(name)) for name in answers):
        record = {**record, answers[0]: _OPEN}
    conversation = parse_record(format_name, None, record)
    assert isinstance(conversation, Conversation)
    if conversation.tools:
        raise RowError("the row has tools, which are not shown to those who judge its answers")
    messages, reference = conversation.messages, None
    if messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1]["content"]
    if not messages or messages[-1]["role"] != "user" or is_empty(messages[-1]["content"].strip()):
        raise RowError("the row asks nothing: no user's text stands before the answer")
    return Question(_id(record.get("id"), number), messages, None if reference == _OPEN else reference)


def _id(value: Any, number: str) -> str:
    if is_empty(value):
        return number
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise RowError("the column 'id' is neither a text nor a whole number", f"it is {kind(value)}")
