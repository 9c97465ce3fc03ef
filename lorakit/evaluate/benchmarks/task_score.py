"""The figures of lm-eval's tasks, each with lorakit's interval, made from the value of every sample."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from lorakit.evaluate.metric import Interval, Measure, Score, intervals, mean, ratio
from lorakit.registry import Unit

Key = tuple[str, str]
"""A metric, and the filter that took the answer from what the model wrote; empty where a task has one way only."""


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One figure of one task or group. `interval` is None where the figure is not a function of sums over rows
    (matthews_corrcoef, corpus BLEU). `higher`: whether more is better, None where the task does not say. `shots`:
    examples in the prompt, drawn from `pool` rows; None and 0 for a group. `within`: the group in whose figure this
    task is counted, empty for what was asked for. `rows_of`: a hash of each row; `measure` holds what each adds, in
    the same order."""

    task: str
    metric: str
    filter: str
    value: float
    higher: bool | None
    shots: int | None
    within: str
    measure: Measure | None
    interval: Interval | None
    rows_of: list[str]
    pool: int = 0

    @property
    def name(self) -> str:
        """The figure's name: `gsm8k exact_match (strict-match)`."""
        return f"{self.task} {self.metric}" + (f" ({self.filter})" if self.filter else "")

    def __str__(self) -> str:
        if self.interval is None or self.measure is None:
            return f"{self.value:.4g}"
        return str(Score(self.measure, self.interval))

    def to_dict(self) -> dict[str, Any]:
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        facts = {"task": self.task, "metric": self.metric, "filter": self.filter, "value": self.value}
        facts |= {"low": low, "high": high, "rows": len(self.rows_of), "higher_is_better": self.higher}
        return facts | {"shots": self.shots, "within": self.within}


def task_scores(
    results: Mapping[str, Any], loaded: Mapping[str, Any], names: Sequence[str], seed: int
) -> list[TaskScore]:
    """All of lm-eval's figures, in its order. `loaded`: its tasks and groups; `names`: those asked for."""
    scores: dict[str, list[TaskScore]] = {name: [] for name in results["results"]}
    within: dict[str, str] = {}  # by task or group not asked for, the group with a figure of its own that counts it
    for name, group in loaded["groups"].items():
        if any(True for _ in _figures(results["results"].get(name, {}))):
            inner = [task.task_name for task in group.get_all_tasks()] + [one.name for one in group.get_all_groups()]
            within |= {member: name for member in inner if member not in within and member not in names}

    def add(name: str, key: Key, value: float, higher: Any, shots: Any, measure: Any, rows: Any, pool: int) -> None:
        interval = intervals({"": measure}, seed)[""] if measure is not None else None
        group = within.get(name, "")
        scores[name].append(TaskScore(name, *key, value, higher, shots, group, measure, interval, rows, pool))

    for name, task in loaded["tasks"].items():
        higher, shots = task.higher_is_better(), int(task.get_config("num_fewshot") or 0)
        pool = len(task.fewshot_docs() or ()) if shots else 0
        rows, measures = _sample_measures(results["samples"][name], task.aggregation(), higher)
        for key, value in _figures(results["results"][name]):
            add(name, key, value, higher.get(key[0]), shots, measures.get(key), rows, pool)
    for name, group in loaded["groups"].items():
        for key, value in _figures(results["results"].get(name, {})):
            of_tasks = [one for task in group.get_all_tasks() for one in scores[task.task_name]]
            members = [one for one in of_tasks if (one.metric, one.filter) == key]
            # lm-eval weighs a group's tasks by their rows, unless the group says that they count alike.
            weighted = all(each.weight_by_size for each in group.aggregate_metric_list if each.metric == key[0])
            measure = _group_measure([one.measure for one in members], weighted)
            add(name, key, value, members[0].higher, None, measure, [row for one in members for row in one.rows_of], 0)
    return [one for of_name in scores.values() for one in of_name]


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[Key, float]]:
    """The values of lm-eval's `metric,filter` keys, without its standard errors."""
    for name, value in result.items():
        metric, comma, answer_filter = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield (metric, "" if answer_filter == "none" else answer_filter), float(value)


def _sample_measures(
    samples: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Any], higher: Mapping[str, bool | None]
) -> tuple[list[str], dict[Key, Measure]]:
    """A hash of each row of a task, and a measure of each metric whose figure is a function of sums over rows."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    known, measures = {function: name for name, function in AGGREGATION_REGISTRY.items()}, dict[Key, Measure]()
    for answer_filter, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            # A metric without an aggregation gets lm-eval's mean; a task's own function has no name here.
            function = aggregation.get(metric)
            name = "mean" if function is None else known.get(function, "")
            measure = _measure(name, [row.get(metric) for row in rows], higher.get(metric))
            if measure is not None:
                measures[metric, "" if answer_filter == "none" else answer_filter] = measure
    return [row["doc_hash"] for row in next(iter(by_filter.values()))], measures


def _group_measure(parts: Sequence[Measure | None], weighted: bool) -> Measure | None:
    """The mean of all rows of these tasks, or the mean of the tasks' means; None if a task's figure is not a mean."""
    means = [part for part in parts if part is not None and part.pool is ratio]
    if not means or len(means) != len(parts):
        return None
    unit: Unit = "share" if all(part.unit == "share" for part in means) else "ratio"
    rows = [part.rows for part in means]
    if weighted:
        return Measure(np.concatenate(rows), ratio, unit, means[0].higher)
    # Each task has two columns to itself.
    columns = block_diag(*rows)
    return Measure(columns, lambda sums: ratio(sums.reshape(*sums.shape[:-1], -1, 2)).mean(-1), unit, means[0].higher)


def _measure(aggregation: str, values: Sequence[Any], higher: bool | None) -> Measure | None:
    """The measure of a metric's values, one a row, None for a row without; None for another aggregation."""
    match aggregation:
        case "mean" | "nanmean":
            numbers = _numbers(values)
            is_share = (((numbers >= 0) & (numbers <= 1)) | np.isnan(numbers)).all()
            return mean(numbers, "share" if is_share else "ratio", higher)
        case "perplexity":  # of each row's log-likelihood, however many tokens it has
            return Measure(mean(_numbers(values)).rows, lambda sums: np.exp(-ratio(sums)), "perplexity", higher)
        case "weighted_perplexity":
            return Measure(_pairs(values), lambda sums: np.exp(-ratio(sums)), "perplexity", higher)
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
            # Not `ratio` itself, by which _group_measure knows a mean of rows.
            return Measure(np.stack([hits, pairs.sum(axis=1)], axis=1), lambda sums: ratio(sums), "share", higher)
    return None


def _numbers(values: Sequence[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def _pairs(values: Sequence[Any]) -> np.ndarray:
    """(rows, 2): such as a text's log-likelihood and its words or bytes; zeros for a row without."""
    return np.array([(0.0, 0.0) if value is None else value for value in values], dtype=float)
