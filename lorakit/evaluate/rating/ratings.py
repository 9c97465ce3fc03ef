"""Ratings that people exported from a rating sheet: files and key -> scores of models."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from lorakit.data.readers import reading
from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import KEY, KEY_KIND, LETTERS, UNSURE, VERSION
from lorakit.recipe.problem import dotted_name, one_line, show_path

KIND = "lorakit-ratings"
_EXPORT_AGAIN = "Export it again from the sheet's page"


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1
        raise ValueError("it is not a rating")
    return value


_Score = Annotated[Literal[1, 2, 3, 4, 5, "cannot judge"], BeforeValidator(_refuse_bool)]


class _Exact(BaseModel):
    """What a file of ours holds: nothing else, and values as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _AnswerRating(_Exact):
    question: str
    answer: str
    scores: dict[str, _Score]
    comment: str
    at: str


class _RatingFile(_Exact):
    """What the sheet's page exports (lorakit/evaluate/rating/sheet_page/ratings.js)."""

    kind: str
    version: int
    sheet: str
    name: str
    rater: str = Field(min_length=1)
    token: str = Field(min_length=1)
    started: str
    exported: str
    ratings: list[_AnswerRating]

    @field_validator("exported")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("it has no time zone")
        return value

    @property
    def rater_name(self) -> str:
        return " ".join(self.rater.split())


class _KeyQuestion(_Exact):
    id: str
    answers: list[list[str]]


class _Key(_Exact):
    """What `write_sheet` keeps from the raters."""

    kind: str
    version: int
    sheet: str
    name: str
    seed: int
    models: list[str]
    criteria: list[str]
    questions: list[_KeyQuestion]


@dataclass(frozen=True)
class Comment:
    """What a rater wrote on an answer, and the models that gave it."""

    rater: str
    question: str
    models: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Ratings:
    """Unblinded ratings of a sheet.

    `scores`: (raters, shown answers, criteria), 1 to 5, NaN where nothing was rated. `shown_at`: (questions, models),
    which shown answer is that model's. `unsure`: how many scales were answered with 'cannot judge'; `open`: how many
    not at all. `notes`: what the user should know of the files.
    """

    sheet: str
    name: str
    models: tuple[str, ...]
    criteria: tuple[str, ...]
    raters: tuple[str, ...]
    scores: np.ndarray
    shown_at: np.ndarray
    unsure: int
    open: int
    comments: tuple[Comment, ...]
    notes: tuple[str, ...]


def read_ratings(files: Sequence[Path], key_path: Path) -> Ratings:
    """Read what raters exported and find whose the answers were. `key_path`: the sheet's `key.json`, or its folder.

    Of several files of one rater the one that was exported last counts: each export holds all that the rater had
    given. Two that began separately under one name may be two people, and are refused.

    Raises:
        UserError: a file is damaged, is not one of these, or is of another sheet; raters cannot be told apart; nothing
            is rated.
    """
    key = _read_key(key_path / KEY if key_path.is_dir() else key_path)
    latest, notes = _latest_files({path: _read_file(path, key) for path in dict.fromkeys(files)})
    shown_at = np.zeros((len(key.questions), len(key.models)), dtype=int)
    shown: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
    for row, question in enumerate(key.questions):
        for letter, models in zip(LETTERS, question.answers, strict=False):
            shown_at[row, [key.models.index(model) for model in models]] = len(shown)
            shown[question.id, letter] = len(shown), tuple(models)
    scores = np.full((len(latest), len(shown), len(key.criteria)), np.nan)
    unsure, comments = 0, []
    for rater, (path, file) in enumerate(latest):
        _check_ratings(path, file, key.criteria, shown)
        for rating in file.ratings:
            at, authors = shown[rating.question, rating.answer]
            for name, score in rating.scores.items():
                unsure += score == UNSURE
                scores[rater, at, key.criteria.index(name)] = np.nan if score == UNSURE else score
            if rating.comment.strip():
                comments.append(Comment(file.rater.strip(), rating.question, authors, rating.comment.strip()))
    if np.isnan(scores).all():
        raise UserError("none of the files holds a rating from 1 to 5: there is nothing to report.")
    return Ratings(
        sheet=key.sheet,
        name=key.name,
        models=tuple(key.models),
        criteria=tuple(key.criteria),
        raters=tuple(file.rater.strip() for _, file in latest),
        scores=scores,
        shown_at=shown_at,
        unsure=unsure,
        open=int(np.isnan(scores).sum()) - unsure,
        comments=tuple(comments),
        notes=tuple(notes),
    )


def _read_key(path: Path) -> _Key:
    facts = _read_json(path)
    if facts.get("kind") != KEY_KIND:
        raise UserError(f"{show_path(path)}: not the key of a rating sheet. Write the path of its {KEY}.")
    key = _validate(_Key, facts, path, "Take the key as `lorakit rate sheet` wrote it")
    authors = [sorted(model for answer in question.answers for model in answer) for question in key.questions]
    if any(models != sorted(key.models) for models in authors):
        raise UserError(f"{show_path(path)}: the key is damaged: a question does not have one answer of each model.")
    return key


def _read_file(path: Path, key: _Key) -> _RatingFile:
    name, facts = show_path(path), _read_json(path)
    if facts.get("kind") == KEY_KIND:
        raise UserError(f"{name}: this is the key of a sheet, not a rater's file. Leave it out, or give it as --key.")
    if facts.get("kind") != KIND:
        raise UserError(f"{name}: not a file of exported ratings. Take what the sheet's page exports.")
    if facts.get("sheet") != key.sheet:
        given = one_line(str(facts.get("sheet")))
        raise UserError(
            f"{name}: these are ratings of the sheet {given}, and the key is that of {key.sheet}. Take the key of that "
            "sheet, or leave the file out."
        )
    return _validate(_RatingFile, facts, path, _EXPORT_AGAIN)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with reading(path):
            facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = "not valid JSON: the file is damaged or of another kind"
        raise UserError(f"{show_path(path)}: {what} ({error}).") from error
    return facts if isinstance(facts, dict) else {}


_Shape = TypeVar("_Shape", bound=_Exact)


def _validate(shape: type[_Shape], facts: Mapping[str, Any], path: Path, remedy: str) -> _Shape:
    name = show_path(path)
    if facts.get("version") != VERSION:
        given = one_line(repr(facts.get("version")))
        raise UserError(f"{name}: version: {given} is not the version that this lorakit reads, {VERSION}. {remedy}.")
    try:
        return shape.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = one_line(repr(first["input"]))
        raise UserError(f"{name}: {dotted_name(first['loc'])}: {given}: {first['msg'].lower()}. {remedy}.") from error


def _latest_files(files: Mapping[Path, _RatingFile]) -> tuple[list[tuple[Path, _RatingFile]], list[str]]:
    """The newest file of each rater, by name; and a note on each of the others."""
    latest: dict[str, tuple[Path, _RatingFile]] = {}
    first_of_token: dict[str, tuple[Path, str]] = {}
    notes = []
    for path, file in sorted(files.items(), key=lambda item: datetime.fromisoformat(item[1].exported)):
        rater, shown = file.rater_name, one_line(file.rater_name)
        first_path, first_name = first_of_token.setdefault(file.token, (path, rater))
        if first_name.casefold() != rater.casefold():
            raise UserError(
                f"{show_path(path)}: it continues the ratings of {one_line(first_name)} in {show_path(first_path)} "
                f"under the name {shown}. Leave one of them out; a new rater begins with 'Start over' on the page."
            )
        if rater.casefold() in latest:
            older_path, older = latest[rater.casefold()]
            if older.token != file.token:
                raise UserError(
                    f"{show_path(path)}: another rater of the name {shown} is in {show_path(older_path)}. Leave one "
                    'out if they are one person, else change "rater" in one of them.'
                )
            notes.append(f"{shown}: {show_path(older_path)} is left out: {show_path(path)} was exported after it")
        latest[rater.casefold()] = path, file
    return [latest[rater] for rater in sorted(latest)], notes


def _check_ratings(path: Path, file: _RatingFile, criteria: Sequence[str], shown: Collection[tuple[str, str]]) -> None:
    """Refuse ratings of an answer or a criterion that the sheet does not have, and a second one of the same answer."""
    seen = set()
    for number, rating in enumerate(file.ratings):
        place, answer = (rating.question, rating.answer), f"question {rating.question!r}, answer {rating.answer!r}"
        unknown = sorted(set(rating.scores) - set(criteria))
        if place not in shown:
            reason = f"the sheet has no {one_line(answer)}"
        elif place in seen:
            reason = f"{one_line(answer)} is rated twice"
        elif unknown:
            reason = f"the sheet does not ask for {one_line(', '.join(unknown))}, but for {', '.join(criteria)}"
        else:
            seen.add(place)
            continue
        raise UserError(f"{show_path(path)}: ratings[{number}]: {reason}. {_EXPORT_AGAIN}.")
