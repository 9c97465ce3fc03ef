"""Ratings that people exported from a rating sheet: means, comparisons of models, and how far the raters agree."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorakit.amounts import counted
from lorakit.data.readers import reading
from lorakit.errors import UserError
from lorakit.evaluate.metric import wilson
from lorakit.evaluate.rating.sheet import KEY, LETTERS, UNSURE
from lorakit.evaluate.report import Table
from lorakit.recipe.problem import dotted_name, one_line, show_path

_EXPORT_AGAIN = "Export it again from the sheet's page"
_RESAMPLES, _RESAMPLES_AT_ONCE = 10_000, 500
# With fewer questions on which two models differ, no outcome is unlikely enough by chance: if each difference were as
# likely to go either way, five of five one way would come up in 2 / 2^5 = 6 % of all cases, six of six in 3 %.
_FEWEST_DIFFERING = 6

Bounds = tuple[float, float]
"""A 95 % interval, NaN where there is none."""
_NONE: Bounds = (float("nan"), float("nan"))


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1
        raise ValueError("it is not a rating")
    return value


_Score = Annotated[Literal[1, 2, 3, 4, 5, "cannot judge"], BeforeValidator(_refuse_bool)]


class _FileModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _AnswerRating(_FileModel):
    question: str
    answer: str
    scores: dict[str, _Score]
    comment: str
    at: str


class _RatingFile(_FileModel):
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


class _KeyQuestion(_FileModel):
    id: str
    answers: list[list[str]]


class _Key(_FileModel):
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
    """Unblinded ratings of the sheet of `key`. `scores`: (raters, shown answers, criteria), 1 to 5, NaN where nothing
    was rated. `shown_at`: (questions, models), which shown answer is that model's. `unsure`: how many scales were
    answered with 'cannot judge'; `open`: how many not at all. `comments`: what a `rater` wrote on an answer to a
    `question`, as `text`, and the `models` that gave it. `notes`: what the user should know of the files."""

    key: _Key
    raters: list[str]
    scores: np.ndarray
    shown_at: np.ndarray
    unsure: int
    open: int
    comments: list[dict[str, Any]]
    notes: list[str]

    def scores_of(self, model: int, criterion: int) -> np.ndarray:
        """The ratings (raters, questions) of a model's answers."""
        return np.asarray(self.scores[:, self.shown_at[:, model], criterion])


def read_ratings(files: Sequence[Path], key_path: Path) -> Ratings:
    """Read what raters exported and find whose the answers were. `key_path`: the sheet's `key.json`, or its folder. Of
    several files of one rater the last export counts, which holds all that the rater had given. Two that began apart
    under one name may be two people, and are refused, as are damaged files and those of another sheet."""
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
    return Ratings(key, raters, scores, shown_at, unsure, left, comments, notes)


_Shape = TypeVar("_Shape", _RatingFile, _Key)
_KINDS = {"lorakit-ratings": "ratings that a sheet's page exported", "lorakit-key": "the key of a sheet"}


def _read(path: Path, shape: type[_Shape], remedy: str) -> _Shape:
    """A file of this shape; an error that names the first thing that is not as it should be, and the remedy."""
    name = show_path(path)
    try:
        with reading(path):
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        (wanted,) = get_args(shape.model_fields["kind"].annotation)
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind != wanted:
            other = f", but {_KINDS[kind]}" if isinstance(kind, str) and kind in _KINDS else ""
            raise UserError(f"{name}: not {_KINDS[wanted]}{other}. {remedy}.")
        return shape.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = "" if first["type"] == "missing" else f"{one_line(repr(first['input']))}: "
        raise UserError(f"{name}: {dotted_name(first['loc'])}: {given}{first['msg'].lower()}. {remedy}.") from error
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


def report_ratings(ratings: Ratings, seed: int = 0) -> dict[str, Any]:
    """Means, comparisons of every two models, and agreement, for each criterion: the document of `--json`. The
    questions are the sample: intervals say what other questions like these would change, with the same raters. Raters
    are averaged within a question, which so counts once. A comparison takes each rater's own difference, so that a
    strict rater and a mild one do not blur it. Of twenty comparisons of equal models one comes out better or worse."""
    models, criteria = list(enumerate(ratings.key.models)), list(enumerate(ratings.key.criteria))
    rated = ~np.isnan(ratings.scores)
    return {
        "sheet": ratings.key.sheet,
        "name": ratings.key.name,
        "raters": ratings.raters,
        "ratings": int(rated.sum()),
        "unsure": ratings.unsure,
        "open": ratings.open,
        "means": [
            {"model": model, "criterion": criterion, **_mean_rating(ratings.scores_of(at, scale), seed)}
            for scale, criterion in criteria
            for at, model in models
        ],
        "compared": [
            {"model": model, "against": against, "criterion": criterion}
            | _compare(ratings.scores_of(at, scale), ratings.scores_of(other, scale), seed)
            for (other, against), (at, model) in combinations(models, 2)
            for scale, criterion in criteria
        ],
        "agreement": [
            {
                "criterion": criterion,
                "alpha": krippendorff_alpha(ratings.scores[:, :, scale]),
                "equal": equal_share(ratings.scores[:, :, scale]),
                "shared": int((rated[:, :, scale].sum(axis=0) > 1).sum()),
            }
            for scale, criterion in criteria
        ],
        "comments": ratings.comments,
        "notes": ratings.notes,
    }


def rating_tables(report: Mapping[str, Any]) -> list[Table]:
    raters, means = counted(len(report["raters"]), "rater"), dict[str, list[str]]()
    for one in report["means"]:
        means.setdefault(one["criterion"], [one["criterion"]]).append(_cell(one["mean"], ".2f", one["interval"]))
    models = list(dict.fromkeys(one["model"] for one in report["means"]))
    tables = [(f"{report['name']}: {report['ratings']:,} ratings by {raters}", ["", *models], list(means.values()))]
    for (model, against), group in groupby(report["compared"], itemgetter("model", "against")):
        of_pair = list(group)
        cells = [["difference", *(_cell(one["difference"], "+.2f", one["interval"]) for one in of_pair)]]
        cells += [
            [side, *(_cell(one[side], ".0%", one[f"{side}_interval"]) for one in of_pair)]
            for side in ("win", "tie", "loss")
        ]
        cells += [[key, *(f"{one[key]}" for one in of_pair)] for key in ("questions", "verdict")]
        tables.append((f"{model} against {against}", ["", *(one["criterion"] for one in of_pair)], cells))
    if len(report["raters"]) > 1:
        columns = ["", "Krippendorff's alpha", "equal ratings", "answers rated by several"]
        cells = [
            [one["criterion"], _cell(one["alpha"], ".2f"), _cell(one["equal"], ".0%"), f"{one['shared']:,}"]
            for one in report["agreement"]
        ]
        tables.append(("agreement between raters", columns, cells))
    return tables


def _cell(value: float, style: str, interval: Bounds = _NONE) -> str:
    bounds = "" if np.isnan(interval[0]) else f" ({interval[0]:{style}} to {interval[1]:{style}})"
    return "-" if np.isnan(value) else format(value, style) + bounds


def _average_raters(values: np.ndarray) -> np.ndarray:
    """The mean over the raters that gave a value, of each question that has one: (raters, questions) -> (some,)."""
    return np.asarray(np.nanmean(values[:, ~np.isnan(values).all(axis=0)], axis=0))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _mean_rating(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Of a model's ratings (raters, questions): the mean over the questions of the mean over their raters."""
    values, rated = _average_raters(scores), int((~np.isnan(scores)).sum())
    facts = {"mean": _mean(values), "interval": bootstrap_interval(values, seed)}
    return facts | {"questions": len(values), "ratings": rated}


def _compare(scores: np.ndarray, against: np.ndarray, seed: int) -> dict[str, Any]:
    """Of two models' ratings (raters, questions), by raters who rated both: the difference in points, and the shares of
    questions on which the first one's is higher, the same or lower; a question on which raters differ counts in parts.
    """
    differences = scores - against
    values, sign = _average_raters(differences), np.sign(differences)
    interval = bootstrap_interval(values, seed)
    compared: dict[str, Any] = {"difference": _mean(values), "interval": interval}
    for name, side in (("win", 1), ("tie", 0), ("loss", -1)):
        share = _mean(_average_raters(np.where(np.isnan(sign), np.nan, sign == side)))
        # Too wide rather than too narrow for questions that count in parts, which vary less.
        bounds = wilson(share * len(values), len(values)) if len(values) else None
        compared |= {name: share, f"{name}_interval": (bounds.low, bounds.high) if bounds else _NONE}
    verdict = "cannot tell at this size"
    if (values != 0).sum() >= _FEWEST_DIFFERING and not interval[0] <= 0 <= interval[1]:
        verdict = "better" if interval[0] > 0 else "worse"
    return compared | {"questions": len(values), "verdict": verdict}


def bootstrap_interval(values: np.ndarray, seed: int) -> Bounds:
    """The 95 % percentile interval of the mean of `values` (n,), from seeded resamples; none of fewer than two."""
    if len(values) < 2:
        return _NONE
    generator, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn = generator.integers(len(values), size=(_RESAMPLES_AT_ONCE, len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return (float(low), float(high))


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Krippendorff's alpha for ordinal ratings: 1 where raters agree, 0 where they agree as by chance, below 0 less.
    `ratings`: (raters, units), NaN where a rater gave none. Units that fewer than two rated do not count. NaN where
    alpha is not defined: nobody rated what another did, or all those ratings are one value. Source: K. Krippendorff,
    Computing Krippendorff's Alpha-Reliability (2011), with the ordinal metric difference."""
    counts = _count_values(ratings)
    pairs = counts / (counts.sum(axis=1, keepdims=True) - 1)
    coincidences = counts.T @ pairs - np.diag(pairs.sum(axis=0))
    margin = coincidences.sum(axis=1)
    below = np.cumsum(margin) - margin / 2
    distance = (below[:, None] - below[None, :]) ** 2
    expected = float(margin @ distance @ margin)
    if expected == 0:
        return float("nan")
    return 1 - (float(margin.sum()) - 1) * float((coincidences * distance).sum()) / expected


def equal_share(ratings: np.ndarray) -> float:
    """Of all pairs of ratings (raters, units) by two raters of one unit, the share that are equal; NaN without any."""
    counts = _count_values(ratings)
    raters = counts.sum(axis=1)
    pairs = float((raters * (raters - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else float("nan")


def _count_values(ratings: np.ndarray) -> np.ndarray:
    """How many raters gave each value (units with two ratings or more, values in their order)."""
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(axis=0).astype(float)
    return np.asarray(counts[counts.sum(axis=1) >= 2])
