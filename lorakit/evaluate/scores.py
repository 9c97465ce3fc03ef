"""The metrics of a recipe on one model's answers: a measure for every name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.bounds import TooLong, bounded
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.metric import Measure, mean
from lorakit.recipe.choice import entry_name, entry_settings
from lorakit.recipe.section import Section
from lorakit.registry import METRICS, MetricSpec

# What a metric may compute on one answer; most take microseconds.
_SECONDS = 10
# Those that take all answers together load models and such: so many answers' time besides.
_TO_BEGIN = 6
_SLOW_PATTERN = (
    "A regular expression that repeats a repetition, such as (a+)+, tries every way to share out the text: write it so "
    "that only one fits."
)


@dataclass(frozen=True, eq=False)
class Scores:
    """One model's scores. Each measure holds the same rows, in the order of the answers."""

    measures: dict[str, Measure]

    @property
    def values(self) -> dict[str, float]:
        """Each score over all rows that have one."""
        return {name: measure.value for name, measure in self.measures.items()}

    @property
    def by_row(self) -> np.ndarray:
        """The score of each row alone (rows, measures), NaN where a row has none."""
        return np.stack([measure.by_row for measure in self.measures.values()], axis=1)


def row_scores(metrics: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Every metric of the list, a word or a word with settings as the recipe has it, on the answers to some rows.

    A metric's parts are named `metric.part`, in the order in which rows first have them. A score that no row has is
    left out.

    Raises:
        UserError: a metric's settings name what cannot be used.
        LorakitError: a metric gives a row no number.
    """
    measures: dict[str, Measure] = {}
    for metric in metrics:
        entry, settings = METRICS[entry_name(metric)], entry_settings(METRICS, metric)
        rows = _rows(entry, settings, answers, references)
        parts = dict.fromkeys(part for row in rows for part in row)
        measures |= {f"{entry.name}.{part}" if part else entry.name: _measure(entry, rows, part) for part in parts}
    return Scores({name: measure for name, measure in measures.items() if not math.isnan(measure.value)})


def _rows(
    entry: MetricSpec, settings: Section | None, answers: Sequence[str], references: Sequence[str]
) -> list[Mapping[str, Any]]:
    more = () if settings is None else (settings,)
    found: list[Mapping[str, Any]] = []
    try:
        if entry.batched:
            with bounded(_SECONDS * (len(answers) + _TO_BEGIN)):
                return list(entry.function(answers, references, *more)) if answers else []
        for answer, reference in zip(answers, references, strict=True):
            with bounded(_SECONDS):
                found.append(entry.function(answer, reference, *more))
    except TooLong as error:
        raise UserError(
            f"evaluate.metrics: {entry.name} computes for more than {_SECONDS} s on answer {len(found) + 1} of "
            f"{len(answers)}, or as much on each. {_SLOW_PATTERN if settings is not None else 'Leave the metric out.'}"
        ) from error
    return found


def _measure(entry: MetricSpec, rows: Sequence[Mapping[str, Any]], part: str) -> Measure:
    unit, higher, pool = entry.unit, entry.higher, entry.pool
    width = max(np.size(row[part]) for row in rows if part in row)
    absent = np.full(width, 0.0 if pool else math.nan)
    values = np.array([np.asarray(row.get(part, absent), dtype=float).reshape(-1) for row in rows])
    wrong = np.flatnonzero((~np.isfinite(values)).any(1) & np.array([part in row for row in rows]))
    if len(wrong):
        where = f"{entry.name}.{part}" if part else entry.name
        raise LorakitError(
            f"the metric {where} gives answer {wrong[0] + 1} of {len(rows)} the score {rows[wrong[0]][part]}, which is "
            "no number. A row without a score is one whose mapping lacks the name."
        )
    return Measure(values, pool, unit, higher) if pool else mean(values[:, 0], unit, higher)
