"""A measure: one number about many rows, kept as what each row adds to it; and the measures of a recipe's metrics.

Every score is a function of sums over rows: a mean (values, rows that have one), a loss (nats, tokens), corpus BLEU
(its n-gram counts). So it can be computed again over any choice of rows, which intervals need.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorakit.amounts import percent
from lorakit.bounds import TooLong, bounded
from lorakit.errors import LorakitError, UserError
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.registry import METRICS, MetricSpec, Section, Unit

UNITS = {"share": "{:.1%}", "points": "{:.1f}", "ratio": "{:.3f}", "nats": "{:.4f}", "perplexity": "{:.4g}"}
"""How a value of each unit is written: shares of 1 as per cent, points of 100 as they are."""

# What a metric may compute on one answer; most take microseconds. Batched ones load models and such first: they get the
# time of so many more answers.
_SECONDS, _TO_BEGIN = 10, 6
_SLOW_PATTERN = (
    "A regular expression that repeats a repetition, such as (a+)+, tries every way to share out the text: write it so "
    "that only one fits."
)


@dataclass(frozen=True, eq=False)
class Measure:
    """What each row adds to one number.

    `rows` (rows, statistics) holds zeros for a row that has none; `pool` turns their sums, an array (..., statistics),
    into numbers (...), NaN if there is none. `higher`: whether more is better; None if neither is.
    """

    rows: np.ndarray
    pool: Callable[[np.ndarray], np.ndarray]
    unit: Unit = "share"
    higher: bool | None = True

    @property
    def value(self) -> float:
        """The number over all rows; NaN if no row has any."""
        return float(self.pool(self.rows.sum(0)))

    @property
    def by_row(self) -> np.ndarray:
        """The number of each row alone (rows,), NaN if it has none."""
        return self.pool(self.rows)

    def write(self, value: float) -> str:
        """A value of this measure as a table shows it."""
        if np.isnan(value):
            return "-"
        return percent(value, 1) if self.unit == "share" else UNITS[self.unit].format(value)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over second, NaN where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def mean(values: np.ndarray, unit: Unit = "share", higher: bool | None = True) -> Measure:
    """The mean of one value per row (rows,); rows with NaN are left out."""
    there = ~np.isnan(values)
    return Measure(np.stack([np.where(there, values, 0.0), there.astype(float)], axis=1), ratio, unit, higher)


def loss(nats: np.ndarray, tokens: np.ndarray) -> Measure:
    """Mean cross-entropy per token, from each row's summed nats (rows,) and trained tokens (rows,): a ratio of sums."""
    return Measure(np.stack([nats, tokens], axis=1).astype(float), ratio, "nats", higher=False)


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Measure:
    """The exponential of `loss`, at most exp(700)."""

    return replace(loss(nats, tokens), pool=lambda sums: np.exp(np.minimum(ratio(sums), 700.0)), unit="perplexity")


def row_scores(metrics: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
    """A measure of every metric in the list (a word, or a word with settings as in the recipe) on the answers.

    All hold the same rows, in the order of the answers. A metric's parts are named `metric.part`, in the order in which
    rows first have them. A score that no row has is left out; NaN or infinity is an error.
    """
    measures: dict[str, Measure] = {}
    for metric in metrics:
        entry, settings = METRICS[entry_name(metric)], entry_settings(METRICS, metric)
        rows = _scores(entry, settings, answers, references)
        for part in dict.fromkeys(part for row in rows for part in row):
            name = f"{entry.name}.{part}" if part else entry.name
            measures[name] = _measure(entry, name, [row.get(part) for row in rows])
    return {name: measure for name, measure in measures.items() if not math.isnan(measure.value)}


def _scores(
    entry: MetricSpec, settings: Section | None, answers: Sequence[str], references: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The scores of each row by their part's name."""
    more = () if settings is None else (settings,)
    scores: list[Mapping[str, Any]] = []
    try:
        if entry.batched:
            with bounded(_SECONDS * (len(answers) + _TO_BEGIN)):
                return list(entry.function(answers, references, *more)) if answers else []
        for answer, reference in zip(answers, references, strict=True):
            with bounded(_SECONDS):
                scores.append(entry.function(answer, reference, *more))
    except TooLong as error:
        raise UserError(
            f"evaluate.metrics: {entry.name} computes for more than {_SECONDS} s on answer {len(scores) + 1} of "
            f"{len(answers)}, or as much on each. {_SLOW_PATTERN if settings is not None else 'Leave the metric out.'}"
        ) from error
    return scores


def _measure(entry: MetricSpec, name: str, rows: Sequence[Any]) -> Measure:
    """The measure of one score of each row, or of what it adds to one; None of a row without."""
    width = max(np.size(row) for row in rows if row is not None)
    absent = np.full(width, 0.0 if entry.pool else math.nan)
    values = np.array([absent if row is None else np.asarray(row, dtype=float).reshape(-1) for row in rows])
    broken = np.flatnonzero(~np.isfinite(values).all(1) & [row is not None for row in rows])
    if len(broken):
        raise LorakitError(
            f"the metric {name} gives answer {broken[0] + 1} of {len(rows)} the score {rows[broken[0]]}, which is not "
            "a number. For a row without a score leave the name out of its mapping."
        )
    if entry.pool:
        return Measure(values, entry.pool, entry.unit, entry.higher)
    return mean(values[:, 0], entry.unit, entry.higher)
