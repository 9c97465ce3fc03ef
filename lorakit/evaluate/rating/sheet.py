"""The rating sheet: one HTML page on which people rate answers without knowing whose they are."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lorakit.atomic_io import atomic_dir, exclusive_lock
from lorakit.errors import UserError
from lorakit.evaluate.rating.questions import Question
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
        """The facts for `--json`."""
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
    """Write the page for raters, the key to it, and a README. `answers`: each model's, one to each question.

    Answers that are equal, white space around them aside, are shown once and credited to all who gave them: people
    would give the same text different ratings, a difference that says nothing about the models. A question's answers
    stand in the order of a hash of `seed`, the question's id and the answer, so the page is the same whoever wrote
    which answer, and tells nothing of it even to those who know the seed.

    Raises:
        UserError: there is nothing to compare, the folder is not a sheet, or it holds another sheet and `overwrite` is
            False.
    """
    if len({question.id for question in questions}) < len(questions):
        raise UserError("two questions of the rating sheet have one id: ratings could not be told apart.")
    if not 2 <= len(answers) <= len(LETTERS):
        raise UserError(f"a rating sheet compares the answers of 2 to {len(LETTERS)} models, not of {len(answers)}.")
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
    if KEY not in there or there - {PAGE, KEY, README}:
        strange = one_line(", ".join(sorted(there - {PAGE, KEY, README}) or sorted(there)))
        raise UserError(
            f"{show_path(folder)}: holds other things than a sheet ({strange}). Write the name of a new folder."
        )
    try:
        old = json.loads((folder / KEY).read_text(encoding="utf-8"))["sheet"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f"its {KEY} is not the key of a sheet. Write the name of a new folder."
        raise UserError(f"{show_path(folder)}: {reason}") from error
    if old != sheet_id and not overwrite:
        raise UserError(
            f"{show_path(folder)}: the folder holds another sheet, whose ratings nobody could read without its {KEY}. "
            "Write the name of a new folder, or --overwrite."
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
