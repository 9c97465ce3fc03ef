"""Scores with their intervals, each model against the baseline, and how both are written."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.evaluate.intervals import Comparison, Interval, compare, count_rows, intervals
from lorakit.evaluate.metric import Measure

Groups = dict[str, dict[str, Measure]]
"""Measures by what they are taken on; those of one group hold the same rows: `rows`, `answers`, and `labels` of a
task."""

# Two models share these only if their tokenizers cut the rows alike.
_PER_TOKEN = ("loss", "perplexity")
_NO_INTERVAL = {"low": None, "high": None, "method": None}


@dataclass(frozen=True, eq=False)
class Score:
    """One measure of one model, with its 95 % interval if the rows allow one."""

    measure: Measure
    interval: Interval | None

    @property
    def rows(self) -> int:
        """How many rows have it."""
        return count_rows(self.measure)

    def __str__(self) -> str:
        write, interval = self.measure.write, self.interval
        bounds = f" ({write(interval.low)} to {write(interval.high)})" if interval else ""
        return write(self.measure.value) + bounds


def score_groups(groups: Groups, seed: int) -> dict[str, Score]:
    """Every measure of the groups with its interval."""
    scores: dict[str, Score] = {}
    for group in groups.values():
        bounds = intervals(group, seed)
        scores |= {name: Score(measure, bounds[name]) for name, measure in group.items()}
    return scores


def compare_groups(first: Groups, second: Groups, same_tokens: bool, seed: int) -> dict[str, Comparison]:
    """The second model against the first, for all measures that both have. `same_tokens`: whether their tokenizers cut
    the rows alike; otherwise measures per token are left out."""
    compared: dict[str, Comparison] = {}
    for group, measures in first.items():
        shared = {name: measure for name, measure in measures.items() if same_tokens or name not in _PER_TOKEN}
        compared |= compare(shared, second.get(group, {}), seed)
    return compared


COMPARISON_COLUMNS = ["", "difference", "95 % interval", "verdict"]


def comparison_row(name: str, one: Comparison, measure: Measure) -> list[str]:
    """A comparison as a table shows it: the difference and its interval with their signs, of shares in percentage
    points, and the verdict; if there is none, about how many rows would give one."""

    def signed(value: float) -> str:
        if math.isnan(value):
            return "-"
        if measure.unit == "share":
            return f"{100 * value:+.1f}"
        return ("+" if value >= 0 else "") + measure.write(value)

    interval = f"{signed(one.interval.low)} to {signed(one.interval.high)}" if one.interval else "-"
    verdict: str = one.verdict
    if verdict == "cannot tell":
        verdict = "cannot tell at this size"
        if one.rows_needed is not None and one.rows_needed > one.rows:
            scale = 10 ** max(0, int(math.log10(one.rows_needed)) - 1)
            rounded = -(-one.rows_needed // scale) * scale  # to two figures: it is an estimate
            verdict += f", about {rounded:,} rows would be needed"
    return [name, signed(one.difference), interval, verdict]


def score_to_dict(score: Score) -> dict[str, Any]:
    """A score as the files have it."""
    return {
        "value": score.measure.value,
        **(asdict(score.interval) if score.interval else _NO_INTERVAL),
        "unit": score.measure.unit,
        "higher_is_better": score.measure.higher,
        "rows": score.rows,
    }


def comparison_to_dict(one: Comparison) -> dict[str, Any]:
    """A comparison as the files have it."""
    return {
        "difference": one.difference,
        **(asdict(one.interval) if one.interval else _NO_INTERVAL),
        "verdict": one.verdict,
        "rows": one.rows,
        "rows_needed": one.rows_needed,
    }
