"""Scores with their intervals, and each subject against the baseline."""

import math
from dataclasses import dataclass
from typing import Any

from lorakit.evaluate.intervals import Comparison, Interval, compare, intervals
from lorakit.evaluate.metric import Measure
from lorakit.evaluate.results import PER_TOKEN, Groups, ModelResult


@dataclass(frozen=True, eq=False)
class Score:
    """One measure of one model, with its 95 % interval where the rows allow one."""

    measure: Measure
    interval: Interval | None

    @property
    def rows(self) -> int:
        """How many rows have it."""
        return int((self.measure.rows != 0).any(1).sum())

    def __str__(self) -> str:
        write, interval = self.measure.write, self.interval
        bounds = f" ({write(interval.low)} to {write(interval.high)})" if interval else ""
        return write(self.measure.value) + bounds


def score_groups(groups: Groups, seed: int) -> dict[str, Score]:
    """Every measure of the groups with its interval."""
    found: dict[str, Score] = {}
    for group in groups.values():
        bounds = intervals(group, seed)
        found |= {name: Score(measure, bounds[name]) for name, measure in group.items()}
    return found


def comparisons(first: ModelResult, second: ModelResult, seed: int) -> dict[str, Comparison]:
    """The second subject against the first, of all measures that both have and share."""
    return _compared(first.measures, second.measures, first.rendered is second.rendered, seed)


def part_comparisons(first: ModelResult, second: ModelResult, part: str, seed: int) -> dict[str, Comparison]:
    """The same on the rows of one task or source."""
    return _compared(first.parts.get(part, {}), second.parts.get(part, {}), first.rendered is second.rendered, seed)


def _compared(first: Groups, second: Groups, same_tokens: bool, seed: int) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    for group, measures in first.items():
        shared = {name: measure for name, measure in measures.items() if same_tokens or name not in PER_TOKEN}
        found |= compare(shared, second.get(group, {}), seed)
    return found


def format_difference(one: Comparison, measure: Measure) -> str:
    """A difference with its sign, in the measure's unit: shares in points of per cent."""
    return _signed(one.difference, measure)


def format_interval(one: Comparison, measure: Measure) -> str:
    """The interval of a difference; `-` where there is none."""
    if one.interval is None:
        return "-"
    return f"{_signed(one.interval.low, measure)} to {_signed(one.interval.high, measure)}"


def format_verdict(one: Comparison) -> str:
    """The verdict in words, and where none can be told about how many rows would tell."""
    if one.verdict != "cannot tell":
        return one.verdict
    if one.rows_needed is None or one.rows_needed <= one.rows:
        return "cannot tell at this size"
    return f"cannot tell at this size, about {_rounded(one.rows_needed):,} rows would be needed"


def _rounded(rows: int) -> int:
    """To two figures: it is an estimate."""
    scale = 10 ** max(0, int(math.log10(rows)) - 1)
    return -(-rows // scale) * scale


def _signed(value: float, measure: Measure) -> str:
    if math.isnan(value):
        return "-"
    if measure.unit == "share":
        return f"{100 * value:+.1f}"
    return ("+" if value >= 0 else "") + measure.write(value)


def score_to_dict(score: Score) -> dict[str, Any]:
    """A score as the files have it."""
    measure, interval = score.measure, score.interval
    return {
        "value": measure.value,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "method": interval.method if interval else None,
        "unit": measure.unit,
        "higher_is_better": measure.higher,
        "rows": score.rows,
    }


def comparison_to_dict(one: Comparison) -> dict[str, Any]:
    """A comparison as the files have it."""
    return {
        "difference": one.difference,
        "low": one.interval.low if one.interval else None,
        "high": one.interval.high if one.interval else None,
        "method": one.interval.method if one.interval else None,
        "verdict": one.verdict,
        "rows": one.rows,
        "rows_needed": one.rows_needed,
    }
