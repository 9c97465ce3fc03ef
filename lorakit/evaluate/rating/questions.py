"""Questions for people to rate answers to: a file -> questions, some with reference answers -> each model's answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.conversations import Conversation, Message
from lorakit.data.formats import parse_record
from lorakit.data.formats.columns import is_empty
from lorakit.data.readers import read_file, reading
from lorakit.data.readers.text_stream import TextStream, decode_lines, read_whole_lines
from lorakit.data.rows import RowError, kind
from lorakit.errors import UserError
from lorakit.evaluate.generate import decode_answer
from lorakit.evaluate.inference import EvalModel, ModelLoader, generate_answers, loading_order
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import RenderedRows, load_tokenizers, prompt_template
from lorakit.evaluate.results import EvalSettings
from lorakit.model.tokenizer import stop_token_ids
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line, show_path

# The column that tells a row's format; the format; the columns for its answer, which a question may lack.
_FORMATS = {
    "messages": ("messages", ()),
    "conversations": ("sharegpt", ()),
    "question": ("question-answer", ("answer", "answers")),
    "prompt": ("prompt-completion", ("completion",)),
    "instruction": ("alpaca", ("output",)),
}
_NO_ANSWER = "\0"
"""The answer of a row without one while it is read: these formats require an answer."""


@dataclass(frozen=True)
class Question:
    """`messages` to the model, the last one the user's; `reference`: a good answer, if one is known."""

    id: str
    messages: list[Message]
    reference: str | None = None


def read_questions(path: Path) -> list[Question]:
    """The questions of a file: each line of a `.txt`, else each row, with or without its answer.

    Rows are those of the formats messages, sharegpt, question-answer, prompt-completion and alpaca. A question's id is
    the row's `id`, else its number, from 1. A UserError names the line that is not a question, or has another's id.
    """
    questions: dict[str, tuple[str, Question]] = {}
    rows = _read_lines(path) if path.name.endswith(".txt") else ((row.where, row.record) for row in read_file(path))
    for number, (where, record) in enumerate(rows, start=1):
        try:
            if isinstance(record, RowError):
                raise record
            question = _parse_question(record, str(number))
        except RowError as error:
            raise UserError(f"{where}: {error}.") from error
        if question.id in questions:
            first = questions[question.id][0]
            raise UserError(f"{where}: the id {one_line(repr(question.id))} is that of {first} too. Write another.")
        questions[question.id] = where, question
    if not questions:
        raise UserError(f"{show_path(path)}: the file has no questions. Write one a line, or rows with `question`.")
    return [question for _, question in questions.values()]


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    name = show_path(path)
    with reading(path), path.open("rb") as file:
        for lines in read_whole_lines(TextStream(name, file, "", ".txt")):
            # Not splitlines, which also breaks at characters that editors show within a line.
            for line, text in enumerate(decode_lines(name, lines).split("\n"), start=lines.first):
                if text.strip():
                    yield f"{name}:{line}", {"question": text.strip()}


def _parse_question(record: Mapping[str, Any], number: str) -> Question:
    column = next((column for column in _FORMATS if not is_empty(record.get(column))), None)
    if column is None:
        raise RowError(f"the row has no question: none of the columns {', '.join(_FORMATS)}")
    name = number if is_empty(record.get("id")) else record["id"]
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RowError("the column 'id' is neither a text nor a whole number", f"it is {kind(name)}")
    format_name, answers = _FORMATS[column]
    if answers and all(is_empty(record.get(answer)) for answer in answers):
        record = {**record, answers[0]: _NO_ANSWER}
    conversation = parse_record(format_name, None, record)
    assert isinstance(conversation, Conversation)
    if conversation.tools or any(message.get("tool_calls") for message in conversation.messages):
        raise RowError("the row has tools, which raters would not see")
    messages, reference = conversation.messages, None
    if messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1]["content"]
    if not messages or messages[-1]["role"] != "user" or is_empty(messages[-1]["content"].strip()):
        raise RowError("the row has no question: no text of the user before the answer")
    return Question(str(name), messages, None if reference == _NO_ANSWER else reference)


def answer_questions(
    model_set: ModelSet, questions: Sequence[Question], settings: EvalSettings, progress: Progress
) -> dict[str, list[str]]:
    """Each model's greedy answer to each question, in its own chat template with its run's system prompt."""
    loader, tokenizers, answers = ModelLoader(model_set.machine.device), load_tokenizers(model_set, progress), {}
    for at in loading_order(model_set.specs):
        spec, tokenizer = model_set.specs[at], tokenizers[at]
        if not tokenizer.chat_template:
            raise UserError(
                f"--questions: {spec.given}: has no chat template. Leave it out, or add a run whose recipe names one."
            )
        template = prompt_template(spec, tokenizer, model_set)
        prompts = [prompt_tokens(question, template) for question in questions]
        for question in questions:
            for what, field in template.controls.spelled(Conversation(question.messages)):
                progress.warn(f"{spec.name}: question {question.id}, {field}: {what}")
        own_stops = spec.prepared.stop_ids if spec.prepared else stop_token_ids(spec.base, tokenizer)
        stops = tuple(sorted({*own_stops, *tokenizer.convert_tokens_to_ids(sorted(template.stops))}))
        rendered = RenderedRows(tokenizer, stops, [], [])
        eval_model = EvalModel(spec, rendered, loader, settings.cache, progress)
        generated = generate_answers(eval_model, prompts, settings.max_new_tokens)
        answers[spec.name] = [decode_answer(answer.tokens, tokenizer) for answer in generated]
    return {spec.name: answers[spec.name] for spec in model_set.specs}


def prompt_tokens(question: Question, template: ChatTemplate) -> list[int]:
    """The question as the template writes it for the model to answer, as token ids."""
    messages = question.messages
    if template.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    marks = [mark for mark in sorted(template.marks) for message in messages if mark in message["content"]]
    if marks:
        raise UserError(
            f"--questions: question {question.id} contains {marks[0]!r}, which the model reads as a mark of its chat "
            "template. Write the question without such marks."
        )
    try:
        text = template.write([template.adapt(message) for message in messages], ask=True)
    except RowError as error:
        raise UserError(f"--questions: question {question.id}: {error}.") from error
    return list(template.tokenizer(text, add_special_tokens=False)["input_ids"])
