"""lm-eval's samples as measures: what every row adds to a task's figure, and every task's rows to a group's."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.registry import AGGREGATION_REGISTRY

from lorakit.evaluate.metric import Measure, mean, ratio
from lorakit.registry import Unit

Key = tuple[str, str]
"""A metric, and the filter that took the answer from what the model wrote."""


def sample_measures(
    samples: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Any], higher: Mapping[str, bool | None]
) -> tuple[tuple[str, ...], dict[Key, Measure]]:
    """A hash of each row of a task, and a measure of each metric whose figure is a function of sums over rows."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    measures: dict[Key, Measure] = {}
    for taken, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            way = _MEASURES.get(_aggregation_name(aggregation.get(metric)))
            values = [row.get(metric) for row in rows]
            measure = way(values, higher.get(metric)) if way else None
            if measure is not None:
                measures[metric, taken] = measure
    first = next(iter(by_filter.values()))
    return tuple(row["doc_hash"] for row in first), measures


def group_measure(parts: Sequence[Measure | None], weighted: bool) -> Measure | None:
    """The mean of all rows of these tasks, or the mean of the tasks' means; None where a task's figure is no mean."""
    means = [part for part in parts if part is not None and part.pool is ratio]
    if not means or len(means) != len(parts):
        return None
    unit: Unit = "share" if all(part.unit == "share" for part in means) else "ratio"
    rows = [part.rows for part in means]
    if weighted:
        return Measure(np.concatenate(rows), ratio, unit, means[0].higher)
    return Measure(_side_by_side(rows), _mean_of_means, unit, means[0].higher)


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(rows of all tasks, 2 x tasks): each task has its two statistics to itself."""
    rows = np.zeros((sum(map(len, parts)), 2 * len(parts)))
    start = 0
    for at, part in enumerate(parts):
        rows[start : start + len(part), 2 * at : 2 * at + 2] = part
        start += len(part)
    return rows


def _mean_of_means(sums: np.ndarray) -> np.ndarray:
    means: np.ndarray = ratio(sums.reshape(*sums.shape[:-1], -1, 2)).mean(-1)
    return means


def _aggregation_name(function: Any) -> str:
    """A metric without an aggregation gets lm-eval's mean; a task's own function has no name here."""
    if function is None:
        return "mean"
    return next((name for name, known in AGGREGATION_REGISTRY.items() if known is function), "")


def _mean(values: Sequence[Any], higher: bool | None) -> Measure:
    """A row that gives none of this metric, or NaN, has none."""
    numbers = np.array([math.nan if value is None else float(value) for value in values])
    shares = ((numbers >= 0) & (numbers <= 1)) | np.isnan(numbers)
    return mean(numbers, "share" if shares.all() else "ratio", higher)


def _pairs(values: Sequence[Any]) -> np.ndarray:
    """(rows, 2): a text's log-likelihood and its words or bytes; zeros for a row without."""
    return np.array([(0.0, 0.0) if value is None else value for value in values], dtype=float)


def _weighted_perplexity(values: Sequence[Any], higher: bool | None) -> Measure:
    return Measure(_pairs(values), lambda sums: np.exp(-ratio(sums)), "perplexity", higher)


def _bits_per_byte(values: Sequence[Any], higher: bool | None) -> Measure:
    return Measure(_pairs(values), lambda sums: -ratio(sums) / math.log(2), "ratio", higher)


def _perplexity(values: Sequence[Any], higher: bool | None) -> Measure:
    """Of each row's log-likelihood, however many tokens it has."""
    return Measure(_mean(values, higher).rows, lambda sums: np.exp(-ratio(sums)), "perplexity", higher)


def _brier(values: Sequence[Any], higher: bool | None) -> Measure:
    """Of each row's true choice and the probabilities of all."""
    squared = [
        math.nan if value is None else float(((np.asarray(value[1]) - np.eye(len(value[1]))[value[0]]) ** 2).sum())
        for value in values
    ]
    return mean(np.array(squared), "ratio", higher)


def _binary_f1(values: Sequence[Any], higher: bool | None) -> Measure | None:
    """Of each row's true and predicted choice, the second of two: twice the hits over how often it is either."""
    pairs = [(0, 0) if value is None else (int(value[0]), int(value[1])) for value in values]
    true, predicted = np.array(pairs).T
    if max(true.max(), predicted.max()) > 1 or min(true.min(), predicted.min()) < 0:
        return None
    return Measure(np.stack([2.0 * true * predicted, true + predicted], axis=1), _f1, "share", higher)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Not `ratio` itself, by which lorakit knows a mean of rows."""
    return ratio(sums)


_MEASURES: dict[str, Callable[[Sequence[Any], bool | None], Measure | None]] = {
    "mean": _mean,
    "nanmean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits_per_byte,
    "brier_score": _brier,
    "f1": _binary_f1,
}
