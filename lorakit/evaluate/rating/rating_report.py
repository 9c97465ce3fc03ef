"""What people's ratings say: means, comparisons of models, and how far the raters agree."""

from collections.abc import Mapping
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from lorakit.amounts import counted
from lorakit.evaluate.metric import wilson
from lorakit.evaluate.rating.ratings import Ratings
from lorakit.evaluate.report import Table

_RESAMPLES, _RESAMPLES_AT_ONCE = 10_000, 500
# With fewer questions on which two models differ, no outcome is unlikely enough by chance: if each difference were as
# likely to go either way, five of five one way would come up in 2 / 2^5 = 6 % of all cases, six of six in 3 %.
_FEWEST_DIFFERING = 6

Bounds = tuple[float, float]
"""A 95 % interval, NaN where there is none."""
_NONE: Bounds = (float("nan"), float("nan"))


def report_ratings(ratings: Ratings, seed: int = 0) -> dict[str, Any]:
    """Means, comparisons of every two models, and agreement, for each criterion: the document of `--json`.

    The questions are the sample: intervals say what other questions like these would change, with the same raters.
    Raters are averaged within a question, so that one question counts once. A comparison takes each rater's own
    difference, so that a strict rater and a mild one do not blur it. Each interval stands alone: of twenty comparisons
    of equal models one comes out as better or worse.
    """
    models, criteria = list(enumerate(ratings.models)), list(enumerate(ratings.criteria))
    rated = ~np.isnan(ratings.scores)
    return {
        "sheet": ratings.sheet,
        "name": ratings.name,
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
    """The report as tables."""
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
    """A figure and its interval, where it has one."""
    bounds = "" if np.isnan(interval[0]) else f" ({interval[0]:{style}} to {interval[1]:{style}})"
    return "-" if np.isnan(value) else format(value, style) + bounds


def _average_raters(values: np.ndarray) -> np.ndarray:
    """The mean over the raters that gave a value, of each question that has one: (raters, questions) -> (some,)."""
    means: np.ndarray = np.nanmean(values[:, ~np.isnan(values).all(axis=0)], axis=0)
    return means


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _mean_rating(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Of a model's ratings (raters, questions): the mean over the questions of the mean over their raters."""
    values = _average_raters(scores)
    rated = int((~np.isnan(scores)).sum())
    interval = bootstrap_interval(values, seed)
    return {"mean": _mean(values), "interval": interval, "questions": len(values), "ratings": rated}


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
        compared |= {name: share, f"{name}_interval": _share_interval(share, len(values))}
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


def _share_interval(share: float, questions: int) -> Bounds:
    """Wilson's interval, too wide rather than too narrow for questions that count in parts, which vary less."""
    if not questions:
        return _NONE
    interval = wilson(share * questions, questions)
    return (interval.low, interval.high)


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
    """Of all pairs of ratings (raters, units) by two raters of one unit, the share that are equal; NaN without any."""
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
