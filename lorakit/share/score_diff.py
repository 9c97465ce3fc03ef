"""The scores of two runs against each other: paired by rows where both were scored on the same ones. Without torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.errors import UserError
from lorakit.evaluate.metric import Comparison, Measure, compare, loss, perplexity, ratio
from lorakit.registry import METRICS
from lorakit.share.scores import StoredScores, value_at

_ROW = ("task", "prompt", "reference")  # what makes two lines the same row
_BEYOND = 1e100  # no score adds up to it
_OF_LOSSES = ("loss", "perplexity", "loss-per-character")


@dataclass(frozen=True)
class ScoreDifference:
    """Two stored scorings. `comparisons` of the second with the first, by score; `unpaired`: why a score, or with the
    empty name all of them, has none."""

    first: StoredScores
    second: StoredScores
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    unpaired: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        sides = [{"file": str(one.path), "taken": one.date, "scores": one.scores} for one in (self.first, self.second)]
        compared = {name: one.to_dict() for name, one in self.comparisons.items()}
        return {"a": sides[0], "b": sides[1], "comparisons": compared, "unpaired": self.unpaired}


def compare_scores(first: StoredScores, second: StoredScores) -> ScoreDifference:
    """The scores of two runs, as they were stored, and their paired comparison where their rows are the same."""
    try:
        rows_a, rows_b = (read_scored_rows(one) for one in (first, second))
    except UserError as error:
        return ScoreDifference(first, second, unpaired={"": str(error)})
    if [_row(line) for line in rows_a] != [_row(line) for line in rows_b]:
        reason = "the two were not scored on the same rows, or their prompts differ"
        return ScoreDifference(first, second, unpaired={"": reason})
    pairs: dict[str, tuple[Measure, Measure]] = {}
    unpaired: dict[str, str] = {}
    for name in (name for name in first.scores if name in second.scores):
        one, other = stored_measure(name, first, rows_a), stored_measure(name, second, rows_b)
        if why := _why_unpaired(name, first, second):
            unpaired[name] = why
        elif one is None or other is None:
            unpaired[name] = "what each row adds to it is not stored"
        elif name in _OF_LOSSES and not np.array_equal(one.rows[:, 1], other.rows[:, 1]):
            unpaired[name] = "the rows are other tokens for the two"
        else:
            pairs[name] = one, other
    seed = value_at(first.document, "settings", "seed")
    compared: dict[str, Comparison] = {}
    losses = [name for name in pairs if name in _OF_LOSSES]
    for group in (losses, [name for name in pairs if name not in losses]):  # rows are drawn for each as when scored
        sides = [{name: pairs[name][side] for name in group} for side in (0, 1)]
        compared |= compare(sides[0], sides[1], seed if isinstance(seed, int) else 0) if group else {}
    return ScoreDifference(first, second, compared, unpaired)


def _why_unpaired(name: str, first: StoredScores, second: StoredScores) -> str | None:
    """Why a score of the two is not of the same thing."""
    metric = name.split(".")[0]
    if name in _OF_LOSSES:
        for one in (first, second):
            counts = value_at(one.document, "rows") or {}
            if counts.get("count") != counts.get("with_answer"):
                return "some rows have no answer, and what they add to the loss is not stored"
        return None
    if metric in first.metrics and first.metrics[metric] != second.metrics.get(metric, first.metrics[metric]):
        return "the metric has other settings in the two"
    lengths = [value_at(one.document, "settings", "max_new_tokens") for one in (first, second)]
    if lengths[0] != lengths[1]:
        return f"answers were generated up to {lengths[0]} tokens for one, and up to {lengths[1]} for the other"
    return None


def read_scored_rows(scores: StoredScores) -> list[dict[str, Any]]:
    """The lines of the rows; UserError where they are gone, damaged, or of a version that stored no sums."""
    if scores.answers is None or not scores.answers.is_file():
        raise UserError(f"{scores.path} has no file of answers beside it")
    try:
        lines = [json.loads(line) for line in scores.answers.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{scores.answers}: damaged: {error}") from error
    if not all(isinstance(value_at(line, "sums", scores.model), dict) for line in lines):
        raise UserError(f"{scores.answers} does not say what each row adds to the scores: it is of an earlier version")
    return lines


def _row(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in _ROW)


def stored_measure(name: str, scores: StoredScores, lines: Sequence[dict[str, Any]]) -> Measure | None:
    """A score as what each row adds to it; None where the rows do not say so, or its metric is not installed."""
    metric, rows = name.split(".")[0], [value_at(line, "sums", scores.model, name) for line in lines]
    if not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        return None
    if not all(
        isinstance(value, int | float) and abs(value) < _BEYOND for row in rows for value in row if value == value
    ):
        return None
    values = np.nan_to_num(np.array(rows, dtype=float))
    if name in _OF_LOSSES:
        return (perplexity if name == "perplexity" else loss)(*values.T[:2])
    if metric not in METRICS:
        return None
    entry = METRICS[metric]
    return Measure(values, entry.pool or ratio, entry.unit, entry.higher)
