"""What people's ratings say: means, comparisons of models, and how far the raters agree."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lorakit.evaluate.intervals import wilson
from lorakit.evaluate.rating.ratings import Comment, Ratings
from lorakit.evaluate.report import Table

_RESAMPLES, _RESAMPLES_AT_ONCE = 10_000, 500
# With fewer questions on which two models differ, no outcome is unlikely enough by chance: if each difference were as
# likely to go either way, five of five one way would come up in 2 / 2^5 = 6 % of all cases, six of six in 3 %.
_FEWEST_DIFFERING = 6

Bounds = tuple[float, float]
"""A 95 % interval, NaN where there is none."""


@dataclass(frozen=True)
class MeanRating:
    """A model's mean rating, over the questions of the mean over their raters."""

    model: str
    criterion: str
    mean: float
    interval: Bounds
    questions: int
    ratings: int


@dataclass(frozen=True)
class RatingComparison:
    """`model` against `against`, by raters who rated both on a question.

    `difference` is of the ratings, in points. `win`, `tie` and `loss` are the shares of questions on which the rating
    of `model` is higher, the same or lower; a question on which raters differ counts in parts.
    """

    model: str
    against: str
    criterion: str
    difference: float
    interval: Bounds
    win: float
    win_interval: Bounds
    tie: float
    tie_interval: Bounds
    loss: float
    loss_interval: Bounds
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

    def tables(self) -> list[Table]:
        """The report as tables."""
        raters = f"{len(self.raters)} rater{'s' * (len(self.raters) != 1)}"
        models = list(dict.fromkeys(one.model for one in self.means))
        means = {one.criterion: [one.criterion] for one in self.means}
        for one in self.means:
            means[one.criterion].append(_cell(one.mean, ".2f", one.interval))
        tables = [(f"{self.name}: {self.ratings:,} ratings by {raters}", ["", *models], list(means.values()))]
        pairs: dict[tuple[str, str], list[RatingComparison]] = {}
        for compared in self.compared:
            pairs.setdefault((compared.model, compared.against), []).append(compared)
        for (model, against), of_pair in pairs.items():
            cells = [[name, *map(write, of_pair)] for name, write in _COMPARISON_ROWS.items()]
            tables.append((f"{model} against {against}", ["", *(one.criterion for one in of_pair)], cells))
        if len(self.raters) > 1:
            columns = ["", "Krippendorff's alpha", "equal ratings", "answers rated by several"]
            cells = [
                [one.criterion, _cell(one.alpha, ".2f"), _cell(one.equal, ".0%"), f"{one.shared:,}"]
                for one in self.agreement
            ]
            tables.append(("agreement between raters", columns, cells))
        return tables


def _cell(value: float, style: str, interval: Bounds = (float("nan"), float("nan"))) -> str:
    """A figure and its interval, where it has one."""
    bounds = "" if np.isnan(interval[0]) else f" ({interval[0]:{style}} to {interval[1]:{style}})"
    return "-" if np.isnan(value) else format(value, style) + bounds


_COMPARISON_ROWS: dict[str, Callable[[RatingComparison], str]] = {
    "difference": lambda one: _cell(one.difference, "+.2f", one.interval),
    "win": lambda one: _cell(one.win, ".0%", one.win_interval),
    "tie": lambda one: _cell(one.tie, ".0%", one.tie_interval),
    "loss": lambda one: _cell(one.loss, ".0%", one.loss_interval),
    "questions": lambda one: f"{one.questions:,}",
    "verdict": lambda one: one.verdict,
}


def report_ratings(ratings: Ratings, seed: int = 0) -> RatingReport:
    """Means, comparisons of every two models, and agreement, for each criterion.

    The questions are the sample: intervals say what other questions like these would change, with the same raters.
    Raters are averaged within a question, so that one question counts once. A comparison takes each rater's own
    difference, so that a strict rater and a mild one do not blur it. Each interval stands alone: of twenty comparisons
    of equal models one comes out as better or worse.
    """
    criteria, models = range(len(ratings.criteria)), range(len(ratings.models))
    return RatingReport(
        sheet=ratings.sheet,
        name=ratings.name,
        raters=ratings.raters,
        ratings=int((~np.isnan(ratings.scores)).sum()),
        unsure=ratings.unsure,
        open=ratings.open,
        means=tuple(_mean_rating(ratings, model, criterion, seed) for criterion in criteria for model in models),
        compared=tuple(
            _compare(ratings, model, against, criterion, seed)
            for against, model in combinations(models, 2)
            for criterion in criteria
        ),
        agreement=tuple(_agreement(ratings, criterion) for criterion in criteria),
        comments=ratings.comments,
        notes=ratings.notes,
    )


def _scores_of(ratings: Ratings, model: int, criterion: int) -> np.ndarray:
    """The ratings (raters, questions) of a model's answers."""
    scores: np.ndarray = ratings.scores[:, ratings.shown_at[:, model], criterion]
    return scores


def _average_raters(values: np.ndarray) -> np.ndarray:
    """The mean over the raters that gave a value, of each question that has one: (raters, questions) -> (some,)."""
    means: np.ndarray = np.nanmean(values[:, ~np.isnan(values).all(axis=0)], axis=0)
    return means


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _mean_rating(ratings: Ratings, model: int, criterion: int, seed: int) -> MeanRating:
    scores = _scores_of(ratings, model, criterion)
    values = _average_raters(scores)
    return MeanRating(
        model=ratings.models[model],
        criterion=ratings.criteria[criterion],
        mean=_mean(values),
        interval=bootstrap_interval(values, seed),
        questions=len(values),
        ratings=int((~np.isnan(scores)).sum()),
    )


def _compare(ratings: Ratings, model: int, against: int, criterion: int, seed: int) -> RatingComparison:
    difference = _scores_of(ratings, model, criterion) - _scores_of(ratings, against, criterion)
    values, sign = _average_raters(difference), np.sign(difference)
    win, tie, loss = (_mean(_average_raters(np.where(np.isnan(sign), np.nan, sign == side))) for side in (1, 0, -1))
    interval = bootstrap_interval(values, seed)
    verdict = "cannot tell at this size"
    if (values != 0).sum() >= _FEWEST_DIFFERING and not interval[0] <= 0 <= interval[1]:
        verdict = "better" if interval[0] > 0 else "worse"
    return RatingComparison(
        model=ratings.models[model],
        against=ratings.models[against],
        criterion=ratings.criteria[criterion],
        difference=_mean(values),
        interval=interval,
        win=win,
        win_interval=_share_interval(win, len(values)),
        tie=tie,
        tie_interval=_share_interval(tie, len(values)),
        loss=loss,
        loss_interval=_share_interval(loss, len(values)),
        questions=len(values),
        verdict=verdict,
    )


def bootstrap_interval(values: np.ndarray, seed: int) -> Bounds:
    """The 95 % percentile interval of the mean of `values` (n,), from seeded resamples; none of fewer than two."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    generator, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn = generator.integers(len(values), size=(_RESAMPLES_AT_ONCE, len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return (float(low), float(high))


def _share_interval(share: float, questions: int) -> Bounds:
    """Wilson's interval, too wide rather than too narrow for questions that count in parts, which vary less."""
    if not questions:
        return (float("nan"), float("nan"))
    interval = wilson(share * questions, questions)
    return (interval.low, interval.high)


def _agreement(ratings: Ratings, criterion: int) -> RaterAgreement:
    scores = ratings.scores[:, :, criterion]
    shared = int(((~np.isnan(scores)).sum(axis=0) > 1).sum())
    return RaterAgreement(ratings.criteria[criterion], krippendorff_alpha(scores), equal_share(scores), shared)


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Krippendorff's alpha for ordinal ratings: 1 where raters agree, 0 where they agree as by chance, below 0 less.

    `ratings`: (raters, units), NaN where a rater gave none. Units that fewer than two rated do not count. NaN where
    alpha is not defined: nobody rated what another did, or all those ratings are one value.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), with the ordinal metric difference.
    """
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
    """Of all pairs of ratings by two raters of one unit, the share that are equal; NaN where there are none.

    `ratings` as for `krippendorff_alpha`.
    """
    counts = _count_values(ratings)
    raters = counts.sum(axis=1)
    pairs = float((raters * (raters - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else float("nan")


def _count_values(ratings: np.ndarray) -> np.ndarray:
    """How many raters gave each value (units with two ratings or more, values in their order)."""
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(axis=0).astype(float)
    shared: np.ndarray = counts[counts.sum(axis=1) >= 2]
    return shared
