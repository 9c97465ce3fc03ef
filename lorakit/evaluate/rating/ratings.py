"""Ratings that people exported from a rating sheet: files and key -> scores of models."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError

from lorakit.data.readers import reading
from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import KEY, LETTERS, UNSURE
from lorakit.recipe.problem import dotted_name, one_line, show_path
from lorakit.registry import Section

_EXPORT_AGAIN = "Export it again from the sheet's page"


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1
        raise ValueError("it is not a rating")
    return value


_Score = Annotated[Literal[1, 2, 3, 4, 5, "cannot judge"], BeforeValidator(_refuse_bool)]


class _AnswerRating(Section):
    question: str
    answer: str
    scores: dict[str, _Score]
    comment: str
    at: str


class _RatingFile(Section):
    """What the sheet's page exports (lorakit/evaluate/rating/sheet_page/ratings.js)."""

    kind: Literal["lorakit-ratings"]
    version: Literal[1]
    sheet: str
    name: str
    rater: str = Field(min_length=1)
    token: str = Field(min_length=1)
    started: str
    exported: Annotated[AwareDatetime, Field(strict=False)]
    ratings: list[_AnswerRating]

    @property
    def rater_name(self) -> str:
        return " ".join(self.rater.split())


class _KeyQuestion(Section):
    id: str
    answers: list[list[str]]


class _Key(Section):
    """What `write_sheet` keeps from the raters."""

    kind: Literal["lorakit-key"]
    version: Literal[1]
    sheet: str
    name: str
    seed: int
    models: list[str]
    criteria: list[str]
    questions: list[_KeyQuestion]


@dataclass(frozen=True)
class Ratings:
    """Unblinded ratings of a sheet.

    `scores`: (raters, shown answers, criteria), 1 to 5, NaN where nothing was rated. `shown_at`: (questions, models),
    which shown answer is that model's. `unsure`: how many scales were answered with 'cannot judge'; `open`: how many
    not at all. `comments`: what a `rater` wrote on an answer to a `question`, as `text`, and the `models` that gave it.
    `notes`: what the user should know of the files.
    """

    sheet: str
    name: str
    models: list[str]
    criteria: list[str]
    raters: list[str]
    scores: np.ndarray
    shown_at: np.ndarray
    unsure: int
    open: int
    comments: list[dict[str, Any]]
    notes: list[str]

    def scores_of(self, model: int, criterion: int) -> np.ndarray:
        """The ratings (raters, questions) of a model's answers."""
        scores: np.ndarray = self.scores[:, self.shown_at[:, model], criterion]
        return scores


def read_ratings(files: Sequence[Path], key_path: Path) -> Ratings:
    """Read what raters exported and find whose the answers were. `key_path`: the sheet's `key.json`, or its folder.

    Of several files of one rater the one that was exported last counts: each export holds all that the rater had
    given. Two that began separately under one name may be two people, and are refused.

    Raises:
        UserError: a file is damaged, is not one of these, or is of another sheet; raters cannot be told apart; nothing
            is rated.
    """
    key_path = key_path / KEY if key_path.is_dir() else key_path
    key = _read(key_path, _Key, f"Give the {KEY} that `lorakit rate sheet` wrote")
    if any(sorted(chain(*question.answers)) != sorted(key.models) for question in key.questions):
        raise UserError(
            f"{show_path(key_path)}: the key is damaged: a question does not have one answer of each model."
        )
    latest, notes = _latest_files([(path, _read(path, _RatingFile, _EXPORT_AGAIN)) for path in dict.fromkeys(files)])
    shown_at = np.zeros((len(key.questions), len(key.models)), dtype=int)
    shown: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for row, question in enumerate(key.questions):
        for letter, models in zip(LETTERS, question.answers, strict=False):
            shown_at[row, [key.models.index(model) for model in models]] = len(shown)
            shown[question.id, letter] = len(shown), models
    scores = np.full((len(latest), len(shown), len(key.criteria)), np.nan)
    unsure, comments = 0, []
    for rater, (path, file) in enumerate(latest):
        _check_ratings(path, file, key, shown)
        for rating in file.ratings:
            at, authors = shown[rating.question, rating.answer]
            for name, score in rating.scores.items():
                unsure += score == UNSURE
                scores[rater, at, key.criteria.index(name)] = np.nan if score == UNSURE else score
            if text := rating.comment.strip():
                by = file.rater.strip()
                comments.append({"rater": by, "question": rating.question, "models": authors, "text": text})
    if np.isnan(scores).all():
        raise UserError("none of the files holds a rating from 1 to 5: there is nothing to report.")
    raters, left = [file.rater.strip() for _, file in latest], int(np.isnan(scores).sum()) - unsure
    of_sheet = (key.sheet, key.name, key.models, key.criteria)
    return Ratings(*of_sheet, raters, scores, shown_at, unsure, left, comments, notes)


_Shape = TypeVar("_Shape", bound=Section)


def _read(path: Path, shape: type[_Shape], remedy: str) -> _Shape:
    """A file of this shape; an error that names the first thing that is not as it should be, and the remedy."""
    name = show_path(path)
    try:
        with reading(path):
            return shape.model_validate(json.loads(path.read_text(encoding="utf-8-sig")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given, where = one_line(repr(first["input"])), f"{dotted_name(first['loc'])}: " if first["loc"] else ""
        raise UserError(f"{name}: {where}{given}: {first['msg'].lower()}. {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: the file is damaged or of another kind ({error}).") from error


def _latest_files(files: Sequence[tuple[Path, _RatingFile]]) -> tuple[list[tuple[Path, _RatingFile]], list[str]]:
    """The newest file of each rater, by name; and a note on each of the others. A rater has one name and one token."""
    latest: dict[str, tuple[Path, _RatingFile]] = {}
    notes = []
    for path, file in sorted(files, key=lambda item: item[1].exported):
        rater, shown = file.rater_name.casefold(), one_line(file.rater_name)
        for name, (older_path, older) in latest.items():
            if (name == rater) != (older.token == file.token):
                what = "is another rater of the name" if name == rater else "continues the ratings of"
                raise UserError(
                    f"{show_path(path)}: {shown} {what} {one_line(older.rater_name)} in {show_path(older_path)}. Leave "
                    'one file out, or, if they are two people of one name, change "rater" in one of them.'
                )
        if rater in latest:
            notes.append(f"{shown}: {show_path(latest[rater][0])} is left out: {show_path(path)} was exported after it")
        latest[rater] = path, file
    return [latest[rater] for rater in sorted(latest)], notes


def _check_ratings(path: Path, file: _RatingFile, key: _Key, shown: Collection[tuple[str, str]]) -> None:
    """Refuse ratings of another sheet, of an answer or a criterion that it lacks, and a second of one answer."""
    if file.sheet != key.sheet:
        raise UserError(
            f"{show_path(path)}: these are ratings of the sheet {one_line(file.sheet)}, and the key is that of "
            f"{key.sheet}. Take the key of that sheet, or leave the file out."
        )
    seen = set()
    for number, rating in enumerate(file.ratings):
        place, answer = (rating.question, rating.answer), f"question {rating.question!r}, answer {rating.answer!r}"
        unknown = sorted(set(rating.scores) - set(key.criteria))
        if place not in shown:
            reason = f"the sheet has no {one_line(answer)}"
        elif place in seen:
            reason = f"{one_line(answer)} is rated twice"
        elif unknown:
            reason = f"the sheet does not ask for {one_line(', '.join(unknown))}, but for {', '.join(key.criteria)}"
        else:
            seen.add(place)
            continue
        raise UserError(f"{show_path(path)}: ratings[{number}]: {reason}. {_EXPORT_AGAIN}.")
