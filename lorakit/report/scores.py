"""The stored scores of a run as a page shows them: every score with its interval as a place on a line, the verdicts,
each row's answers side by side, and confusion matrices."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.amounts import format_difference, format_score
from lorakit.errors import UserError
from lorakit.share.score_diff import read_scored_rows, stored_measure
from lorakit.share.scores import StoredScores, value_at

MOST_CHARACTERS = 4_000
"""Of a prompt or an answer; the rest is counted, and stays in the run's eval/ folder."""


@dataclass(frozen=True)
class ScoreMark:
    """A model's score on a line from 0 to 1. `low` and `high`: its interval, where it has one."""

    model: str
    text: str
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    model: str
    difference: str
    interval: str
    word: str


@dataclass(frozen=True)
class ScoreLine:
    """One score of all models; `places` in the order of the page's models, None for one without it."""

    name: str
    better: str
    places: tuple[ScoreMark | None, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class ScorePart:
    """The scores over all rows (an empty title), or over a task or a source."""

    title: str
    lines: tuple[ScoreLine, ...]


@dataclass(frozen=True)
class ModelAnswer:
    model: str
    text: str
    was_cut: bool
    score: str


@dataclass(frozen=True)
class AnsweredRow:
    """A held-out row with the answers of all models. `mark`: whether the run's answer is better or worse than the
    baseline's by the main score; `changed`: whether it is another text."""

    number: int
    where: str
    task: str
    prompt: str
    reference: str
    answers: tuple[ModelAnswer, ...]
    changed: bool
    mark: str


@dataclass(frozen=True)
class ConfusionMatrix:
    """How often each true label (rows) was given which label (columns), with each cell's share of its row in tenths."""

    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


def score_parts(scores: StoredScores) -> tuple[ScorePart, ...]:
    """Every score that the document has, over all rows and part by part."""
    models: dict[str, Any] = scores.document["models"]
    parts = dict.fromkeys(name for facts in models.values() for name in _mapping(facts.get("parts")))
    titled = [("", ("scores",)), *((name, ("parts", name)) for name in parts)]
    made = [ScorePart(title, tuple(_score_lines(scores, path))) for title, path in titled]
    return tuple(part for part in made if part.lines)


def _score_lines(scores: StoredScores, path: tuple[str, ...]) -> list[ScoreLine]:
    models: dict[str, Any] = scores.document["models"]
    by_model = {name: _mapping(value_at(facts, *path)) for name, facts in models.items()}
    lines = []
    for name in dict.fromkeys(name for one in by_model.values() for name in one):
        of_models = [one.get(name) for one in by_model.values()]
        numbers = [one for one in of_models if isinstance(one, dict) and _is_number(one.get("value"))]
        if not numbers:
            continue
        unit, higher = str(numbers[0].get("unit")), numbers[0].get("higher_is_better")
        low, high = _axis(numbers, unit)
        places = [
            _place(model, one, low, high) if isinstance(one, dict) and _is_number(one.get("value")) else None
            for model, one in zip(by_model, of_models, strict=True)
        ]
        better = "more is better" if higher is True else "less is better" if higher is False else ""
        lines.append(ScoreLine(name, better, tuple(places), tuple(_verdicts(scores, path, name, unit))))
    return lines


def _axis(numbers: Sequence[Mapping[str, Any]], unit: str) -> tuple[float, float]:
    if unit in ("share", "ratio"):
        ends = [one["value"] for one in numbers]
        return min(0.0, *ends), max(1.0, *ends)
    ends = [one[key] for one in numbers for key in ("value", "low", "high") if _is_number(one.get(key))]
    return min(0.0, *ends), max(ends) * 1.02 or 1.0


def _place(model: str, one: Mapping[str, Any], low: float, high: float) -> ScoreMark:
    def at(value: float) -> float:
        return round(min(1.0, max(0.0, (value - low) / (high - low))), 4)

    value, ends = float(one["value"]), [one.get("low"), one.get("high")]
    text = format_score(value, str(one.get("unit")))
    if not (_is_number(ends[0]) and _is_number(ends[1])):
        return ScoreMark(model, text, at(value), None, None)
    return ScoreMark(model, text, at(value), at(float(ends[0] or 0)), at(float(ends[1] or 0)))


def _verdicts(scores: StoredScores, path: tuple[str, ...], name: str, unit: str) -> list[Verdict]:
    verdicts = []
    written = scores.document.get("comparisons")
    for one in written if isinstance(written, list) else ():
        facts = value_at(one, *path, name)
        if isinstance(facts, dict) and _is_number(facts.get("difference")):
            ends = [facts.get(key) for key in ("low", "high")]
            between = (
                " to ".join(format_difference(float(end or 0), unit) for end in ends)
                if all(map(_is_number, ends))
                else ""
            )
            difference = format_difference(float(facts["difference"]), unit)
            verdicts.append(Verdict(str(one.get("model")), difference, between, str(facts.get("verdict"))))
    return verdicts


def answered_rows(scores: StoredScores, most: int) -> tuple[tuple[AnsweredRow, ...], int, str]:
    """The first rows with the answers of all models; how many rows there are, and why there are none to show."""
    try:
        lines = read_scored_rows(scores)
    except UserError as error:
        return (), 0, str(error)
    baseline = str(scores.document.get("baseline"))
    if not any(_mapping(line.get("answers")) for line in lines):
        return (), len(lines), "no answers were generated: the rows were scored by their loss alone"
    marks = _marks(scores, lines, baseline)
    rows = [_answered(scores, line, number, baseline, marks) for number, line in enumerate(lines[:most])]
    return tuple(rows), len(lines), ""


@dataclass(frozen=True)
class _Marks:
    """The main score of every row, by model, and the row's mark."""

    values: Mapping[str, Sequence[float]]
    marks: Sequence[str]
    unit: str


def _marks(scores: StoredScores, lines: Sequence[dict[str, Any]], baseline: str) -> _Marks:
    name, values, unit, higher = scores.main_score, dict[str, Sequence[float]](), "", True
    for model in scores.document["models"]:
        one = StoredScores(scores.path, scores.document, model)
        measure = stored_measure(name, one, lines) if name else None
        if measure is not None:
            with suppress(ValueError, IndexError):  # a pool that makes nothing of one row alone
                values[model], unit, higher = measure.by_row.tolist(), measure.unit, bool(measure.higher)
    if baseline not in values or scores.model not in values or baseline == scores.model:
        return _Marks(values, [""] * len(lines), unit)
    difference = np.array(values[scores.model], dtype=float) - np.array(values[baseline], dtype=float)
    gain = difference if higher else -difference
    words = ["better" if one > 1e-9 else "worse" if one < -1e-9 else "" for one in gain]
    return _Marks(values, words, unit)


def _answered(scores: StoredScores, line: Mapping[str, Any], number: int, baseline: str, marks: _Marks) -> AnsweredRow:
    texts, cut = _mapping(line.get("answers")), line.get("cut")
    answers = tuple(
        ModelAnswer(
            model,
            limited(texts[model]),
            isinstance(cut, list) and model in cut,
            format_score(marks.values[model][number], marks.unit) if model in marks.values else "",
        )
        for model in scores.document["models"]
        if model in texts
    )
    return AnsweredRow(
        number + 1,
        str(line.get("where") or ""),
        str(line.get("task") or ""),
        limited(line.get("prompt")),
        limited(line.get("reference")),
        answers,
        texts.get(baseline) != texts.get(scores.model),
        marks.marks[number],
    )


def confusion_matrices(scores: StoredScores) -> tuple[ConfusionMatrix, ...]:
    """Of every model and every task of a classification, in the document's order."""
    matrices = []
    for model, facts in scores.document["models"].items():
        for task, one in _mapping(facts.get("classification")).items():
            labels, counts = value_at(one, "labels"), value_at(one, "confusion")
            if isinstance(labels, list) and isinstance(counts, list):
                rows = tuple(
                    (str(label), tuple((int(count), round(10 * count / max(sum(row), 1))) for count in row))
                    for label, row in zip(labels, counts, strict=False)
                )
                title = f"{model}: {task}" if task else model
                matrices.append(ConfusionMatrix(title, tuple(map(str, labels)), rows))
    return tuple(matrices)


def limited(text: Any, most: int = MOST_CHARACTERS) -> str:
    """The beginning of a text, and how many characters follow; all of one that is not longer."""
    written = "" if text is None else str(text)
    beyond = len(written) - most
    return f"{written[:most]} … and {beyond:,} more characters" if beyond > 0 else written


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
