"""lm-eval's samples as measures: what every row adds to a task's figure, and every task's rows to a group's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.registry import AGGREGATION_REGISTRY
from scipy.linalg import block_diag

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
    for answer_filter, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            # A metric without an aggregation gets lm-eval's mean; a task's own function has no name here.
            function = aggregation.get(metric)
            names = (name for name, known in AGGREGATION_REGISTRY.items() if known is function)
            name = "mean" if function is None else next(names, "")
            measure = _measure(name, [row.get(metric) for row in rows], higher.get(metric))
            if measure is not None:
                measures[metric, answer_filter] = measure
    first = next(iter(by_filter.values()))
    return tuple(row["doc_hash"] for row in first), measures


def group_measure(parts: Sequence[Measure | None], weighted: bool) -> Measure | None:
    """The mean of all rows of these tasks, or the mean of the tasks' means; None if a task's figure is not a mean."""
    means = [part for part in parts if part is not None and part.pool is ratio]
    if not means or len(means) != len(parts):
        return None
    unit: Unit = "share" if all(part.unit == "share" for part in means) else "ratio"
    rows = [part.rows for part in means]
    if weighted:
        return Measure(np.concatenate(rows), ratio, unit, means[0].higher)
    # Each task has two columns to itself.
    return Measure(block_diag(*rows), _mean_of_means, unit, means[0].higher)


def _mean_of_means(sums: np.ndarray) -> np.ndarray:
    means: np.ndarray = ratio(sums.reshape(*sums.shape[:-1], -1, 2)).mean(-1)
    return means


def _measure(aggregation: str, values: Sequence[Any], higher: bool | None) -> Measure | None:
    """The measure of a metric's values, one a row, None for a row without; None for another aggregation."""
    match aggregation:
        case "mean" | "nanmean":
            numbers = _numbers(values)
            is_share = (((numbers >= 0) & (numbers <= 1)) | np.isnan(numbers)).all()
            return mean(numbers, "share" if is_share else "ratio", higher)
        case "perplexity":  # of each row's log-likelihood, however many tokens it has
            return Measure(mean(_numbers(values)).rows, _exponential, "perplexity", higher)
        case "weighted_perplexity":
            return Measure(_pairs(values), _exponential, "perplexity", higher)
        case "bits_per_byte":
            return Measure(_pairs(values), lambda sums: -ratio(sums) / math.log(2), "ratio", higher)
        case "brier_score":  # of each row's true choice and the probabilities of all
            squares = [
                None if value is None else ((np.asarray(value[1]) - np.eye(len(value[1]))[value[0]]) ** 2).sum()
                for value in values
            ]
            return mean(_numbers(squares), "ratio", higher)
        case "f1":  # of each row's true and predicted choice: the second of two
            pairs = _pairs(values)
            if not np.isin(pairs, (0, 1)).all():
                return None
            hits = 2 * pairs.prod(axis=1)
            # Not `ratio` itself, by which group_measure knows a mean of rows.
            return Measure(np.stack([hits, pairs.sum(axis=1)], axis=1), lambda sums: ratio(sums), "share", higher)
    return None


def _numbers(values: Sequence[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def _pairs(values: Sequence[Any]) -> np.ndarray:
    """(rows, 2): such as a text's log-likelihood and its words or bytes; zeros for a row without."""
    return np.array([(0.0, 0.0) if value is None else value for value in values], dtype=float)


def _exponential(sums: np.ndarray) -> np.ndarray:
    return np.exp(-ratio(sums))
