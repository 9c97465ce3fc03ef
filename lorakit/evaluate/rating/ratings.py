"""Ratings that people exported from a rating sheet: files and key -> scores of models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import KEY, KEY_KIND, LETTERS, UNSURE, VERSION
from lorakit.recipe.problem import dotted_name, one_line, show_path

KIND = "lorakit-ratings"


def _not_true(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1
        raise ValueError("it is not a rating")
    return value


_Score = Annotated[Literal[1, 2, 3, 4, 5, "cannot judge"], BeforeValidator(_not_true)]


class _Exact(BaseModel):
    """What a file of ours holds: nothing else, and values as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Rated(_Exact):
    question: str
    answer: str
    scores: dict[str, _Score]
    comment: str
    at: str


class _File(_Exact):
    """What the sheet's page exports (lorakit/evaluate/rating/sheet_page/ratings.js)."""

    kind: str
    version: int
    sheet: str
    name: str
    rater: str = Field(min_length=1)
    token: str = Field(min_length=1)
    started: str
    exported: str
    ratings: list[_Rated]

    @field_validator("exported")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("it has no time zone")
        return value


class _Question(_Exact):
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
    questions: list[_Question]


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


def read_ratings(files: Sequence[Path], key: Path) -> Ratings:
    """Read what raters exported and say whose the answers were. `key`: the sheet's `key.json`, or its folder.

    Of several files of one rater the one that was exported last counts: each export holds all that the rater had
    given. Two that began apart under one name may be two people, and are refused.

    Raises:
        UserError: a file is damaged, is none of these, or is of another sheet; raters cannot be told apart; nothing
            is rated.
    """
    answers = _read_key(key / KEY if key.is_dir() else key)
    read = {path: _read_file(path, answers) for path in dict.fromkeys(files)}
    chosen, notes = _one_a_rater(read)
    shown = [
        (one.id, letter, models)
        for one in answers.questions
        for letter, models in zip(LETTERS, one.answers, strict=False)
    ]
    places = {(question, letter): (at, tuple(models)) for at, (question, letter, models) in enumerate(shown)}
    scores = np.full((len(chosen), len(places), len(answers.criteria)), np.nan)
    unsure, comments = 0, []
    for rater, (path, file) in enumerate(chosen):
        for rated in _checked(path, file, answers, places):
            at, models = places[rated.question, rated.answer]
            for name, score in rated.scores.items():
                unsure += score == UNSURE
                scores[rater, at, answers.criteria.index(name)] = np.nan if score == UNSURE else score
            if rated.comment.strip():
                comments.append(Comment(file.rater.strip(), rated.question, models, rated.comment.strip()))
    if np.isnan(scores).all():
        raise UserError("none of the files holds a rating from 1 to 5: there is nothing to report.")
    return Ratings(
        sheet=answers.sheet,
        name=answers.name,
        models=tuple(answers.models),
        criteria=tuple(answers.criteria),
        raters=tuple(file.rater.strip() for _, file in chosen),
        scores=scores,
        shown_at=_shown_at(answers),
        unsure=unsure,
        open=int(np.isnan(scores).sum()) - unsure,
        comments=tuple(comments),
        notes=tuple(notes),
    )


def _read_key(path: Path) -> _Key:
    facts = _json(path)
    if facts.get("kind") != KEY_KIND:
        raise UserError(f"{show_path(path)}: not the key of a rating sheet. Write the path of its {KEY}.")
    key = _checked_shape(_Key, facts, path, "Take the key as `lorakit rate sheet` wrote it")
    credited = [sorted(model for answer in question.answers for model in answer) for question in key.questions]
    if any(models != sorted(key.models) for models in credited):
        raise UserError(f"{show_path(path)}: the key is damaged: a question does not have one answer of each model.")
    return key


def _read_file(path: Path, key: _Key) -> _File:
    name, facts = show_path(path), _json(path)
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
    return _checked_shape(_File, facts, path, "Export it again from the sheet's page")


def _json(path: Path) -> dict[str, Any]:
    name = show_path(path)
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such file.") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: the file is damaged or of another kind ({error}).") from error
    return facts if isinstance(facts, dict) else {}


_Shape = TypeVar("_Shape", bound=_Exact)


def _checked_shape(shape: type[_Shape], facts: Mapping[str, Any], path: Path, remedy: str) -> _Shape:
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


def _one_a_rater(read: Mapping[Path, _File]) -> tuple[list[tuple[Path, _File]], list[str]]:
    """The newest file of each rater, by name; and what is said of the others."""
    latest: dict[str, tuple[Path, _File]] = {}
    names: dict[str, tuple[Path, str]] = {}
    notes = []
    for path, file in sorted(read.items(), key=lambda item: datetime.fromisoformat(item[1].exported)):
        rater, shown = " ".join(file.rater.split()), one_line(" ".join(file.rater.split()))
        known = names.setdefault(file.token, (path, rater))
        if known[1].casefold() != rater.casefold():
            raise UserError(
                f"{show_path(path)}: it goes on from the ratings of {one_line(known[1])} in {show_path(known[0])}, "
                f"under the name {shown}. Leave one of them out; a new rater begins with 'Start over' on the page."
            )
        before = latest.get(rater.casefold())
        if before and before[1].token != file.token:
            raise UserError(
                f"{show_path(path)}: another rater of the name {shown} is in {show_path(before[0])}. Leave one out "
                'if they are one person, else change "rater" in one of them.'
            )
        if before:
            notes.append(f"{shown}: {show_path(before[0])} is left out: {show_path(path)} was exported after it")
        latest[rater.casefold()] = path, file
    return [latest[rater] for rater in sorted(latest)], notes


def _checked(path: Path, file: _File, key: _Key, places: Mapping[tuple[str, str], Any]) -> list[_Rated]:
    """A file's ratings, each of an answer that the sheet has."""
    seen = set()
    for number, rated in enumerate(file.ratings):
        place, where = (rated.question, rated.answer), f"{show_path(path)}: ratings[{number}]"
        if place not in places:
            given = one_line(f"{rated.question!r}, answer {rated.answer!r}")
            raise UserError(f"{where}: the sheet has no question {given}. Export it again from the sheet's page.")
        if place in seen:
            given = one_line(f"{rated.question!r}, answer {rated.answer}")
            raise UserError(f"{where}: question {given} is rated twice. Export it again from the sheet's page.")
        strange = sorted(set(rated.scores) - set(key.criteria))
        if strange:
            raise UserError(
                f"{where}.scores: the sheet does not ask for {one_line(', '.join(strange))}, but for "
                f"{', '.join(key.criteria)}. Export it again from the sheet's page."
            )
        seen.add(place)
    return file.ratings


def _shown_at(key: _Key) -> np.ndarray:
    shown_at = np.zeros((len(key.questions), len(key.models)), dtype=int)
    before = 0
    for row, question in enumerate(key.questions):
        for at, models in enumerate(question.answers, start=before):
            shown_at[row, [key.models.index(model) for model in models]] = at
        before += len(question.answers)
    return shown_at
