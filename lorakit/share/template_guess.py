"""A first guess at the format `template`: which column of unknown rows is asked, and which one answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.formats.places import columns_in, find_value
from lorakit.recipe.problem import one_line

# Words in the names of columns that answer, the most telling first, and of those that ask.
_ANSWERS = (
    "answer", "answers", "response", "responses", "completion", "output", "reply", "target", "solution", "summary",
    "translation", "result", "label", "category", "class", "intent", "sentiment", "correction", "rewrite",
    "sql", "code",
)  # fmt: skip
_QUESTIONS = {"question", "query", "instruction", "prompt", "input", "request", "ask"}
# Columns with these words say something of the row, and are not a question.
_ABOUT = {"id", "ids", "uuid", "guid", "idx", "index", "url", "uri", "link", "hash", "timestamp", "date", "created"}
_ABOUT |= {"updated", "role", "split"}
_LABELS = {"category", "class", "label", "labels", "intent", "sentiment", "source", "score", "type", "topic"}
_READ_BY_ITSELF = {"system", "tools", "task"}
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class TemplateGuess:
    """Settings of the format `template`, the columns that get another name for it (ours -> theirs), and why."""

    settings: dict[str, Any]
    columns: dict[str, str]
    why: str


def guess_template(records: Sequence[Mapping[str, Any]]) -> TemplateGuess | None:
    """A template that reads these rows; None where no two columns hold texts."""
    names = list(dict.fromkeys(name for record in records for name in record if name.strip()))
    plain = [name for name in names if name not in _READ_BY_ITSELF and _is_plain(records, name)]
    texts = [name for name in plain if any(isinstance(record.get(name), str) for record in records)]
    about = [name for name in plain if not _ABOUT.isdisjoint(_words(name))]
    objects = [name for name in names if name not in (*_READ_BY_ITSELF, *plain) and _is_filled(records, name)]
    answer = _answer_among([name for name in (*plain, *objects) if name not in about], texts)
    others = [name for name in texts if name not in (answer, *about)]
    questions = [name for name in others if _LABELS.isdisjoint(_words(name))][:_MOST_COLUMNS] or others[:1]
    if answer is None or not questions:
        return None
    questions.sort(key=lambda name: not _QUESTIONS.isdisjoint(_words(name)))
    places = dict[str, str]()
    for name in (*questions, answer):
        places[name] = _place(name, [*names, *places.values()])
    lines = [f"{_label(name)}: {{{places[name]}}}" if questions[1:] else f"{{{places[name]}}}" for name in questions]
    settings: dict[str, Any] = {"user": "\n".join(lines), "assistant": f"{{{places[answer]}}}"}
    lacking = [name for name in questions if any(find_value(record, name) is None for record in records)]
    if lacking:
        settings["missing"] = {places[name]: "" for name in lacking}
    columns = {place: name for name, place in places.items() if place != name}
    shown = one_line(", ".join(map(repr, questions)), 200)
    verb = "are" if questions[1:] else "is"
    why = f"It is taken that {one_line(repr(answer))} answers, and that {shown} {verb} asked: look at both."
    return TemplateGuess(settings, columns, why)


def _is_plain(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [value for record in records if (value := record.get(name)) not in (None, "")]
    return bool(values) and all(isinstance(value, str | int | float) for value in values)


def _is_filled(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(record.get(name) not in (None, "", [], {}) for record in records)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _answer_among(names: Sequence[str], texts: Sequence[str]) -> str | None:
    """The column whose name ends in the most telling word, or has it; else the last one of texts that is not called a
    question."""
    for among in (lambda words: words[-1:], lambda words: words):
        named = [(word, name) for name in names for word in among(_words(name)) if word in _ANSWERS]
        if named:
            return min(named, key=lambda pair: _ANSWERS.index(pair[0]))[1]
    others = [name for name in texts if name in names and _QUESTIONS.isdisjoint(_words(name))]
    return others[-1] if others else None


def _place(name: str, names: Sequence[str]) -> str:
    """The column's name where a place can hold it, else another one that no column has."""
    if columns_in(f"{{{name}}}") == {name}:
        return name
    place = re.sub(r"\W+", "_", name).strip("_") or "column"
    while place in names:
        place += "_"
    return place


def _label(name: str) -> str:
    text = one_line(" ".join(name.replace("_", " ").split()))
    return (text[:1].upper() + text[1:]).rstrip("?: ").replace("{", "{{").replace("}", "}}")
