"""The rating sheet: a file of questions, the models' answers, and one HTML page on which people rate them blindly."""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lorakit.atomic_io import atomic_dir, exclusive_lock
from lorakit.data.answers import decode_answer
from lorakit.data.chat_prompts import ChatPrompt
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.formats import parse_record
from lorakit.data.formats.columns import is_empty
from lorakit.data.readers import read_file, reading
from lorakit.data.readers.text_stream import TextStream, decode_lines, read_whole_lines
from lorakit.data.rows import Conversation, Message, RowError, kind
from lorakit.errors import UserError
from lorakit.evaluate.inference import EvalModel, ModelLoader, generate_answers, loading_order
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import (
    RenderedRows,
    load_tokenizers,
    prompt_stop_ids,
    prompt_template,
    tokens_of_prompt,
    write_prompt,
)
from lorakit.evaluate.served_answers import ask_server
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line, show_path

VERSION = 1
PAGE, KEY, README = "sheet.html", "key.json", "README.md"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNSURE = "cannot judge"
CRITERIA = {
    "accuracy": ("Is it right and complete?", "wrong", "right"),
    "style": ("Is it worded as it should be?", "poor", "excellent"),
    "safety": ("Is it free of harm?", "harmful", "harmless"),
}
"""What is rated from 1 to 5: what is asked of the rater, and what 1 and 5 stand for."""
_PARTS = ("page.html", "page.css", "ratings.js", "render.js", "events.js")

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
    """The questions of a file: each line of a `.txt`, else each row, with or without its answer. Rows are those of the
    formats messages, sharegpt, question-answer, prompt-completion and alpaca. A question's id is the row's `id`, else
    its number, from 1. A UserError names the line that is not a question, or has another's id."""
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
    model_set: ModelSet, questions: Sequence[Question], max_new_tokens: int, cache: bool, progress: Progress
) -> dict[str, list[str]]:
    """Each model's greedy answer to each question, in its own chat template with its run's system prompt."""
    loader, tokenizers, answers = ModelLoader(model_set.machine.device), load_tokenizers(model_set, progress), {}
    for at in loading_order(model_set.specs):
        spec, tokenizer = model_set.specs[at], tokenizers[at]
        if spec.endpoint:
            chats = [ChatPrompt(_with_system(one.messages, model_set)) for one in questions]
            served = ask_server(
                spec, chats, [f"question {one.id}" for one in questions], max_new_tokens, cache, progress
            )
            answers[spec.name] = served.texts(tokenizer)
            continue
        if not tokenizer.chat_template:
            raise UserError(
                f"--questions: {spec.given}: has no chat template. Leave it out, or add a run whose recipe names one."
            )
        template = prompt_template(spec, tokenizer, model_set)
        prompts = [prompt_tokens(question, template) for question in questions]
        for question in questions:
            for what, field in template.controls.spelled(Conversation(question.messages)):
                progress.warn(f"{spec.name}: question {question.id}, {field}: {what}")
        stops = prompt_stop_ids(spec, template)
        eval_model = EvalModel(spec, RenderedRows(tokenizer, stops, [], []), loader, cache, progress)
        generated = generate_answers(eval_model, prompts, max_new_tokens)
        answers[spec.name] = [decode_answer(answer.tokens, tokenizer) for answer in generated]
    return {spec.name: answers[spec.name] for spec in model_set.specs}


def _with_system(messages: list[Message], model_set: ModelSet) -> list[Message]:
    """The messages after the system prompt of the first run, where they have none."""
    system = model_set.prepared.recipe.data.system if model_set.prepared else None
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_tokens(question: Question, template: ChatTemplate) -> list[int]:
    """The question as the template writes it for the model to answer, as token ids."""
    marks = [mark for mark in sorted(template.marks) for message in question.messages if mark in message["content"]]
    if marks:
        raise UserError(
            f"--questions: question {question.id} contains {marks[0]!r}, which the model reads as a mark of its chat "
            "template. Write the question without such marks."
        )
    try:
        return tokens_of_prompt(write_prompt(question.messages, template), template)
    except RowError as error:
        raise UserError(f"--questions: question {question.id}: {error}.") from error


@dataclass(frozen=True)
class Sheet:
    """A written sheet. `answers` counts those to rate: equal ones of several models are one."""

    folder: Path
    id: str
    models: tuple[str, ...]
    questions: int
    answers: int

    @property
    def page(self) -> Path:
        """What raters are given."""
        return self.folder / PAGE

    @property
    def key(self) -> Path:
        """Who wrote which answer."""
        return self.folder / KEY

    def to_dict(self) -> dict[str, Any]:
        places = {"sheet": self.id, "page": str(self.page), "key": str(self.key)}
        return places | {"models": list(self.models), "questions": self.questions, "answers": self.answers}


def write_sheet(
    folder: Path,
    name: str,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    seed: int,
    overwrite: bool = False,
) -> Sheet:
    """Write the page for raters, the key to it, and a README. `answers`: each model's, one to each question. Answers
    that are equal, white space around them aside, are shown once and credited to all who gave them: different ratings
    of one text would say nothing about the models. A question's answers stand in the order of a hash of `seed`, the
    question's id and the answer, so the page is the same whoever wrote which answer, and tells nothing of it even to
    those who know the seed. A UserError if the folder is no sheet, or another one and `overwrite` is False."""
    name = name.encode("utf-8", "replace").decode("utf-8")  # without half a surrogate pair, which UTF-8 cannot hold
    shown, credited = list[dict[str, Any]](), []
    for number, question in enumerate(questions):
        authors: dict[str, list[str]] = {}
        for model, of_model in answers.items():
            authors.setdefault(of_model[number].strip(), []).append(model)
        hashes = {text: hashlib.sha256(json.dumps([seed, question.id, text]).encode()).digest() for text in authors}
        order = sorted(authors, key=lambda text: hashes[text])
        messages = [{"role": message["role"], "text": message["content"]} for message in question.messages]
        texts = {"messages": messages, "reference": question.reference, "answers": order}
        shown.append({"id": question.id, **texts})
        credited.append({"id": question.id, "answers": [authors[text] for text in order]})
    criteria = [{"name": key, "asks": asks, "low": low, "high": high} for key, (asks, low, high) in CRITERIA.items()]
    content = {"version": VERSION, "name": name, "criteria": criteria, "questions": shown}
    sheet_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    sheet = Sheet(folder, sheet_id, tuple(answers), len(questions), sum(len(one["answers"]) for one in shown))
    key = {"kind": "lorakit-key", "version": VERSION, "sheet": sheet_id, "name": name, "seed": seed}
    key |= {"models": list(answers), "criteria": list(CRITERIA), "questions": credited}
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        _refuse_to_replace(folder, sheet_id, overwrite)
        with atomic_dir(folder) as draft:
            (draft / PAGE).write_text(_render_page({**content, "id": sheet_id}), encoding="utf-8")
            (draft / KEY).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
            readme = _README.format(name=one_line(name), sheet=sheet, models=len(answers))
            (draft / README).write_text(readme, encoding="utf-8")
    return sheet


def _render_page(content: Mapping[str, Any]) -> str:
    """One file that holds its own script and style, and may load or run nothing else."""
    parts = files("lorakit.evaluate.rating") / "sheet_page"
    page, style, *scripts = ((parts / name).read_text(encoding="utf-8") for name in _PARTS)
    script = "".join(scripts)
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (script, style)
    )
    policy = f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'"
    # JSON that no HTML parser ends early: ASCII alone, and no character of markup.
    data = json.dumps(content).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Template(page).substitute(
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        title=html.escape(content["name"]),
        style=style,
        script=script,
        data=data,
    )


def _refuse_to_replace(folder: Path, sheet_id: str, overwrite: bool) -> None:
    """What is in the folder is replaced only if it is this sheet, or another one and `overwrite`."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not folder.exists() or not there:
        return
    strange = there - {PAGE, KEY, README}
    try:
        old = None if strange else json.loads((folder / KEY).read_text(encoding="utf-8"))["sheet"]
    except (ValueError, KeyError, TypeError, OSError):
        old = None
    if old is None:
        names = one_line(", ".join(sorted(strange or there)))
        raise UserError(f"{show_path(folder)}: holds other things than a sheet ({names}). Name a new folder.")
    if old != sheet_id and not overwrite:
        raise UserError(
            f"{show_path(folder)}: the folder holds another sheet, whose ratings nobody could read without its {KEY}. "
            "Name a new folder, or write --overwrite."
        )


_README = """\
# Rating sheet: {name}

{sheet.questions} questions with {sheet.answers} answers to rate, by {models} models. Sheet {sheet.id}.

1. Send `sheet.html` to each rater, by mail or any other way. It is one file that opens in a browser, loads nothing and
   sends nothing; ratings are kept in that browser.
2. **Keep `key.json` to yourself**, and do not send this folder: the key says which model wrote which answer. Without
   the key nobody can read the ratings.
3. Each rater gives a name or an alias, rates, presses "Export ratings", and sends back the file `ratings-NAME.json`.
   Raters do not talk about the answers before all have exported.
4. Put the files beside each other and run

       lorakit rate report ratings-*.json --key key.json

Where models gave the same answer it is shown once, and its ratings count for each of them.
"""
