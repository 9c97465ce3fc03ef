"""What people's ratings say: means, comparisons of models, and how far the raters agree."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lorakit.evaluate.rating.agreement import equal_share, krippendorff_alpha
from lorakit.evaluate.rating.ratings import Comment, Ratings

_RESAMPLES = 10_000
_BLOCK = 500
_TWO_SIDED_95 = 1.959964
# With fewer questions on which two models differ, no outcome is unlikely enough by chance: if each difference were as
# likely to go either way, five of five one way would come up in 2 / 2^5 = 6 % of all cases, six of six in 3 %.
_FEWEST_DIFFERING = 6

Interval = tuple[float, float]
"""A 95 % interval, NaN where there is none."""


@dataclass(frozen=True)
class MeanRating:
    """A model's mean rating, over the questions of the mean over their raters."""

    model: str
    criterion: str
    mean: float
    interval: Interval
    questions: int
    ratings: int


@dataclass(frozen=True)
class RatingComparison:
    """`model` against `against`, by raters who rated both on a question.

    `difference` is of the ratings, in points. `win`, `tie` and `loss` are the shares of questions on which the rating
    of `model` is higher, the same or lower; where raters of a question differ it counts by parts.
    """

    model: str
    against: str
    criterion: str
    difference: float
    interval: Interval
    win: float
    win_interval: Interval
    tie: float
    tie_interval: Interval
    loss: float
    loss_interval: Interval
    questions: int
    verdict: str


@dataclass(frozen=True)
class RaterAgreement:
    """Between raters: Krippendorff's alpha (ordinal) and the share of equal ratings; `shared` answers were rated by
    two or more."""

    criterion: str
    alpha: float
    equal: float
    shared: int


@dataclass(frozen=True)
class RatingReport:
    """The report on a sheet's ratings."""

    sheet: str
    name: str
    raters: tuple[str, ...]
    ratings: int
    unsure: int
    open: int
    means: tuple[MeanRating, ...]
    compared: tuple[RatingComparison, ...]
    agreement: tuple[RaterAgreement, ...]
    comments: tuple[Comment, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""
        return asdict(self)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """The report as tables: title, columns and rows of each."""
        raters = f"{len(self.raters)} rater{'s' * (len(self.raters) != 1)}"
        tables = [(f"{self.name}: {self.ratings:,} ratings by {raters}", *_means(self.means))]
        for model, against in dict.fromkeys((one.model, one.against) for one in self.compared):
            pair = [one for one in self.compared if (one.model, one.against) == (model, against)]
            columns = ["", *(one.criterion for one in pair)]
            tables.append((f"{model} against {against}", columns, _comparison(pair)))
        if len(self.raters) > 1:
            columns = ["", "Krippendorff's alpha", "equal ratings", "answers rated by several"]
            tables.append(("agreement between raters", columns, [_agreement(one) for one in self.agreement]))
        return tables


def report_ratings(ratings: Ratings, seed: int = 0) -> RatingReport:
    """Means, comparisons of every two models, and agreement, for each criterion.

    The questions are the sample: intervals say what other questions like these would change, with the same raters.
    Raters are averaged within a question, so that one question counts once. A comparison takes each rater's own
    difference, so that a strict rater and a mild one do not blur it. Each interval is for itself: of twenty
    comparisons of equal models one comes out as better or worse.
    """
    means = [
        _mean(ratings, model, criterion, seed)
        for criterion in range(len(ratings.criteria))
        for model in range(len(ratings.models))
    ]
    compared = [
        _compared(ratings, model, against, criterion, seed)
        for against, model in combinations(range(len(ratings.models)), 2)
        for criterion in range(len(ratings.criteria))
    ]
    return RatingReport(
        sheet=ratings.sheet,
        name=ratings.name,
        raters=ratings.raters,
        ratings=int((~np.isnan(ratings.scores)).sum()),
        unsure=ratings.unsure,
        open=ratings.open,
        means=tuple(means),
        compared=tuple(compared),
        agreement=tuple(_agreed(ratings, criterion) for criterion in range(len(ratings.criteria))),
        comments=ratings.comments,
        notes=ratings.notes,
    )


def bootstrap_interval(values: np.ndarray, seed: int) -> Interval:
    """The 95 % percentile interval of the mean of `values` (n,), from seeded resamples; none of fewer than two."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[random.integers(len(values), size=(_BLOCK, len(values)))].mean(axis=1)
            for _ in range(_RESAMPLES // _BLOCK)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return (float(low), float(high))


def wilson_interval(share: float, count: int) -> Interval:
    """Wilson's 95 % score interval of a share of `count` questions, which has a width at 0 and 1 too.

    Where a question counts by parts it is wider than need be: such a share varies less than one of yes and no.
    """
    if not count:
        return (float("nan"), float("nan"))
    square = _TWO_SIDED_95**2 / count
    middle = share + square / 2
    half = _TWO_SIDED_95 * float(np.sqrt(share * (1 - share) / count + square / (4 * count)))
    return ((middle - half) / (1 + square), (middle + half) / (1 + square))


def _of_model(ratings: Ratings, model: int, criterion: int) -> np.ndarray:
    """(raters, questions): the ratings of a model's answers."""
    scores: np.ndarray = ratings.scores[:, ratings.shown_at[:, model], criterion]
    return scores


def _over_raters(values: np.ndarray) -> np.ndarray:
    """(questions with a value,): the mean over those raters, of (raters, questions), who gave one."""
    rated = ~np.isnan(values)
    counts = rated.sum(axis=0)
    means: np.ndarray = np.where(rated, values, 0).sum(axis=0)[counts > 0] / counts[counts > 0]
    return means


def _average(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _mean(ratings: Ratings, model: int, criterion: int, seed: int) -> MeanRating:
    given = _of_model(ratings, model, criterion)
    values = _over_raters(given)
    return MeanRating(
        model=ratings.models[model],
        criterion=ratings.criteria[criterion],
        mean=_average(values),
        interval=bootstrap_interval(values, seed),
        questions=len(values),
        ratings=int((~np.isnan(given)).sum()),
    )


def _compared(ratings: Ratings, model: int, against: int, criterion: int, seed: int) -> RatingComparison:
    difference = _of_model(ratings, model, criterion) - _of_model(ratings, against, criterion)
    values, sign = _over_raters(difference), np.sign(difference)
    win, tie, loss = (
        _average(_over_raters(np.where(np.isnan(sign), np.nan, sign == side))) for side in (1.0, 0.0, -1.0)
    )
    interval = bootstrap_interval(values, seed)
    return RatingComparison(
        model=ratings.models[model],
        against=ratings.models[against],
        criterion=ratings.criteria[criterion],
        difference=_average(values),
        interval=interval,
        win=win,
        win_interval=wilson_interval(win, len(values)),
        tie=tie,
        tie_interval=wilson_interval(tie, len(values)),
        loss=loss,
        loss_interval=wilson_interval(loss, len(values)),
        questions=len(values),
        verdict=_verdict(interval, int((values != 0).sum())),
    )


def _verdict(interval: Interval, differing: int) -> str:
    if differing >= _FEWEST_DIFFERING and interval[0] > 0:
        return "better"
    if differing >= _FEWEST_DIFFERING and interval[1] < 0:
        return "worse"
    return "cannot tell at this size"


def _agreed(ratings: Ratings, criterion: int) -> RaterAgreement:
    given = ratings.scores[:, :, criterion]
    shared = int(((~np.isnan(given)).sum(axis=0) > 1).sum())
    return RaterAgreement(ratings.criteria[criterion], krippendorff_alpha(given), equal_share(given), shared)


def _means(means: Sequence[MeanRating]) -> tuple[list[str], list[list[str]]]:
    models = list(dict.fromkeys(one.model for one in means))
    rows = {one.criterion: [one.criterion] for one in means}
    for one in means:
        rows[one.criterion].append(_with(one.mean, one.interval, ".2f"))
    return ["", *models], list(rows.values())


def _comparison(pair: Sequence[RatingComparison]) -> list[list[str]]:
    lines: dict[str, Callable[[RatingComparison], str]] = {
        "difference": lambda one: _with(one.difference, one.interval, "+.2f"),
        "win": lambda one: _with(one.win, one.win_interval, ".0%"),
        "tie": lambda one: _with(one.tie, one.tie_interval, ".0%"),
        "loss": lambda one: _with(one.loss, one.loss_interval, ".0%"),
        "questions": lambda one: f"{one.questions:,}",
        "verdict": lambda one: one.verdict,
    }
    return [[name, *map(shown, pair)] for name, shown in lines.items()]


def _agreement(one: RaterAgreement) -> list[str]:
    return [one.criterion, _number(one.alpha, ".2f"), _number(one.equal, ".0%"), f"{one.shared:,}"]


def _number(value: float, style: str) -> str:
    return "-" if np.isnan(value) else format(value, style)


def _with(value: float, interval: Interval, style: str) -> str:
    """A figure and its interval, where it has one."""
    bounds = "" if np.isnan(interval[0]) else f" ({interval[0]:{style}} to {interval[1]:{style}})"
    return _number(value, style) + bounds
