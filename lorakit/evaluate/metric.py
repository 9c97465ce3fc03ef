"""A measure: one number about many rows, kept as what each row adds to it; its interval, and that of a difference.

Every score is a function of sums over rows: a mean (values, rows that have one), a loss (nats, tokens), corpus BLEU
(its n-gram counts). So it can be computed again over any choice of rows, which intervals need.

For 95 % intervals rows are drawn again with replacement, all statistics of a row together, so that a difference is
paired: what makes a row hard for both models cancels out. Each interval is for one comparison: of twenty comparisons of
two equal models one is expected to look different.

The interval is the expanded percentile of the bootstrap (Hesterberg 2015, The American Statistician 69:371), which is
wider than the plain percentile where rows are few. Simulated coverage of 95 % at 10 rows of a skewed difference: 92 %,
where the plain percentile has 88 and BCa 87; of heavy tails 88 (83, 84); at 200 rows all have 94 or 95.

A bootstrap knows only what it saw: 20 right answers of 20 would give an interval without width. Shares of rows that are
right or wrong have the interval of Wilson (1927), their paired difference that of Bonett and Price (2012, British
Journal of Mathematical and Statistical Psychology 65:430). Both take rows to be independent of each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from lorakit.amounts import format_score
from lorakit.bounds import TooLong, bounded
from lorakit.errors import LorakitError, UserError
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.registry import METRICS, MetricSpec, Section, Unit

# What a metric may compute on one answer; most take microseconds. Batched ones load models and such first: they get the
# time of so many more answers.
_SECONDS, _TO_BEGIN = 10, 6
_SLOW_PATTERN = (
    "A regular expression that repeats a repetition, such as (a+)+, tries every way to share out the text: write it so "
    "that only one fits."
)

_Z = float(ndtri(0.975))
_POWER = float(ndtri(0.8))
_RESAMPLES = (1_000, 10_000)
# Of five rows all lie on one side of a middle by chance more often than once in twenty (2 / 2^5), of six they do not.
LEAST_ROWS = 6
# Numbers held at once while rows are drawn, and drawn in all beyond the least number of resamples.
_AT_ONCE, _IN_ALL = 1 << 22, 1 << 24

Verdict = Literal["better", "worse", "higher", "lower", "cannot tell"]
"""Of a difference; higher or lower for a measure without a better."""


@dataclass(frozen=True, eq=False)
class Measure:
    """What each row adds to one number. `rows` (rows, statistics): zeros for a row that has none; `pool` turns their
    sums (..., statistics) into numbers (...), NaN if there is none. `higher`: whether more is better, None: neither."""

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
        return format_score(value, self.unit)


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
    """A measure of every metric in the list (a word, or a word with settings as in the recipe) on the answers. All hold
    the same rows, in the order of the answers. A metric's parts are named `metric.part`, in the order in which rows
    first have them. A score that no row has is left out; NaN or infinity is an error."""
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


def average_by_row(measure: Measure, rows: Sequence[int]) -> Measure:
    """A measure of answers as one of rows: `rows` says whose each answer is, in order. A mean is taken over each row's
    answers first, so that each row counts once; what a pooled score adds up is added up."""
    numbers, of_answer = np.unique(np.asarray(rows), return_inverse=True)
    if len(numbers) == len(rows):
        return measure
    sums = np.zeros((len(numbers), measure.rows.shape[1]))
    np.add.at(sums, of_answer, measure.rows)
    if measure.pool is ratio:
        sums /= np.maximum(sums[:, 1:], 1)
    return replace(measure, rows=sums)


@dataclass(frozen=True)
class Interval:
    """A 95 % interval; `method` is wilson, bonett-price or bootstrap."""

    low: float
    high: float
    method: str


@dataclass(frozen=True, eq=False)
class Score:
    """One measure of one model, with its 95 % interval if the rows allow one."""

    measure: Measure
    interval: Interval | None

    def __str__(self) -> str:
        write, interval = self.measure.write, self.interval
        bounds = f" ({write(interval.low)} to {write(interval.high)})" if interval else ""
        return write(self.measure.value) + bounds

    def to_dict(self) -> dict[str, Any]:
        unit, higher, rows = self.measure.unit, self.measure.higher, count_rows(self.measure)
        facts = {"value": self.measure.value, **_interval_to_dict(self.interval)}
        return facts | {"unit": unit, "higher_is_better": higher, "rows": rows}


@dataclass(frozen=True)
class Comparison:
    """A second model against a first one, on the same rows. `difference` is second minus first, in the measure's unit.
    `interval` is None if the rows allow none: fewer than six, or the same difference in every resample. `rows_needed`:
    about how many would show such a difference in four of five evaluations; None without a difference or interval."""

    first: float
    second: float
    difference: float
    interval: Interval | None
    verdict: Verdict
    rows: int
    rows_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        facts = {"difference": self.difference, **_interval_to_dict(self.interval), "verdict": self.verdict}
        return facts | {"rows": self.rows, "rows_needed": self.rows_needed}


def _interval_to_dict(interval: Interval | None) -> dict[str, Any]:
    return asdict(interval) if interval else {"low": None, "high": None, "method": None}


def intervals(measures: Mapping[str, Measure], seed: int = 0) -> dict[str, Interval | None]:
    """The interval of each measure; None if the rows allow none. All measures hold the same rows."""
    bounds: dict[str, Interval | None] = {name: _of_share(measure) for name, measure in measures.items()}
    drawn = {name: measure for name, measure in measures.items() if bounds[name] is None}
    for (name, measure), values in zip(drawn.items(), _resample([*drawn.values()], seed), strict=True):
        bounds[name] = _expanded_percentile(values, count_rows(measure))
    return bounds


def compare(first: Mapping[str, Measure], second: Mapping[str, Measure], seed: int = 0) -> dict[str, Comparison]:
    """The second model against the first, for every measure that both have, on the same rows."""
    pairs = {name: (measure, second[name]) for name, measure in first.items() if name in second}
    bounds: dict[str, tuple[Interval | None, float]] = {
        name: of_shares for name, pair in pairs.items() if (of_shares := _of_shares(*pair))
    }
    drawn = {name: pair for name, pair in pairs.items() if name not in bounds}
    resampled = _resample([measure for pair in drawn.values() for measure in pair], seed)
    for name, first_values, second_values in zip(drawn, resampled[::2], resampled[1::2], strict=True):
        differences = second_values - first_values
        bounds[name] = (_expanded_percentile(differences, count_rows(*drawn[name])), float(np.std(differences)))
    return {name: _comparison(one, other, *bounds[name]) for name, (one, other) in pairs.items()}


def _comparison(one: Measure, other: Measure, interval: Interval | None, error: float) -> Comparison:
    """`error` is the standard error of the difference, which falls with the square root of the number of rows."""
    difference, rows = other.value - one.value, count_rows(one, other)
    needed, verdict = None, "cannot tell"
    if interval and difference and error > 0:
        needed = math.ceil(rows * ((_Z + _POWER) * error / difference) ** 2)
    if interval and not interval.low <= 0 <= interval.high:
        below, above = ("lower", "higher") if one.higher is None else ("worse", "better")[:: 1 if one.higher else -1]
        verdict = above if interval.low > 0 else below
    return Comparison(one.value, other.value, difference, interval, cast(Verdict, verdict), rows, needed)


def wilson(right: float, rows: int) -> Interval:
    """The interval of a share of `right` in `rows`; it has width at 0 and at 100 % too."""
    share, weight = right / rows, _Z**2 / rows
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / rows + weight / rows / 4) / (1 + weight)
    # Exact at the ends, where rounding would leave a 0 % just above its own lower bound.
    return Interval(0.0 if right == 0 else middle - half, 1.0 if right == rows else middle + half, "wilson")


def bonett_price(gained: int, lost: int, rows: int) -> tuple[Interval, float]:
    """The interval of a paired difference of shares, and its standard error. Rows that one model alone has right:
    `gained` the second, `lost` the first."""
    up, down = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    error = math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    low, high = up - down - _Z * error, up - down + _Z * error
    return Interval(max(low, -1.0), min(high, 1.0), "bonett-price"), error


def count_rows(*measures: Measure) -> int:
    """How many rows have a number of each of these measures."""
    return int(np.logical_and.reduce([(measure.rows != 0).any(1) for measure in measures]).sum())


def _is_right_or_wrong(measure: Measure) -> bool:
    """Whether each row of a share is right or wrong, or has neither."""
    return measure.pool is ratio and measure.unit == "share" and bool(np.isin(measure.rows, (0.0, 1.0)).all())


def _of_share(measure: Measure) -> Interval | None:
    """Wilson's interval of rows that are right or wrong. It is too wide rather than too narrow for shares in between
    that are the same in every row: no values from 0 to 1 vary more about a mean than 0s and 1s."""
    values = measure.by_row[~np.isnan(measure.by_row)]
    if measure.pool is not ratio or measure.unit != "share" or not len(values):
        return None
    if not _is_right_or_wrong(measure) and (np.ptp(values) > 0 or values.min() < 0 or values.max() > 1):
        return None
    return wilson(float(values.sum()), len(values))


def _of_shares(one: Measure, other: Measure) -> tuple[Interval, float] | None:
    """Bonett and Price's interval of rows that are right or wrong, with its standard error; None for other measures."""
    there = one.rows[:, 1] > 0 if _is_right_or_wrong(one) and _is_right_or_wrong(other) else np.zeros(0, bool)
    if not there.any() or not np.array_equal(there, other.rows[:, 1] > 0):
        return None
    first, second = one.rows[there, 0], other.rows[there, 0]
    return bonett_price(int((second > first).sum()), int((second < first).sum()), len(first))


def _expanded_percentile(values: np.ndarray, rows: int) -> Interval | None:
    """The percentiles at which a bootstrap of so few rows is as wide as Student's t interval of a mean."""
    values = values[~np.isnan(values)]
    if rows < LEAST_ROWS or not len(values) or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    below = float(ndtr(-math.sqrt(rows / (rows - 1)) * stdtrit(rows - 1, 0.975)))
    low, high = np.quantile(values, [below, 1 - below])
    return Interval(float(low), float(high), "bootstrap")


def _resample(measures: Sequence[Measure], seed: int) -> list[np.ndarray]:
    """Each measure (resamples,) over rows drawn with replacement; the same rows for all of them."""
    if not measures or not len(measures[0].rows):
        return [np.empty(0)] * len(measures)
    statistics = np.concatenate([measure.rows for measure in measures], axis=1)
    edges = np.cumsum([measure.rows.shape[1] for measure in measures])[:-1]
    generator, rows, sums = np.random.default_rng(seed), len(statistics), []
    least, most = _RESAMPLES
    left = max(least, min(most, _IN_ALL // rows))
    while left:
        some = min(left, max(1, _AT_ONCE // rows))
        drawn = generator.integers(0, rows, (some, rows)) + rows * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * rows).reshape(some, rows)  # how often each row is drawn
        sums.append(counts.astype(float) @ statistics)
        left -= some
    parts = np.split(np.concatenate(sums), edges, axis=1)
    return [measure.pool(part) for measure, part in zip(measures, parts, strict=True)]
