"""Benchmarks: lm-eval's tasks on a model in memory, with an interval for each figure.

Figures are lm-eval's own. Intervals and comparisons are lorakit's, from the value of every sample, because lm-eval's
standard errors know nothing of a share near 0 or 1 and nothing of two models on the same rows.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.intervals import Comparison, Interval, compare, intervals
from lorakit.evaluate.metric import Measure
from lorakit.progress import Progress


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One figure of one task or group.

    `filter` says how the answer was taken from what the model wrote; empty where a task has one way only. `interval`
    is None where the figure is no sum over rows (matthews_corrcoef, corpus BLEU). `higher`: whether more is better,
    None where the task does not say. `shots`: examples in the prompt; None for a group. `within`: the group in whose
    figure this task is counted, empty for what was asked for. `rows_of`: a hash of each row; `measure` holds what each
    of them adds, in the same order.
    """

    task: str
    metric: str
    filter: str
    value: float
    interval: Interval | None
    rows: int
    higher: bool | None
    shots: int | None
    within: str
    measure: Measure | None
    rows_of: tuple[str, ...]

    @property
    def name(self) -> str:
        """The figure's name: `gsm8k exact_match (strict-match)`."""
        return f"{self.task} {self.metric}" + (f" ({self.filter})" if self.filter else "")


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    include: Path | None,
    limit: int | None,
    batch_size: int,
    progress: Progress,
    seed: int = 0,
    *,
    chat: bool = False,
    variables: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    label: str = "tasks",
) -> list[TaskScore]:
    """The figures of these tasks, groups and their members, in lm-eval's order.

    Args:
        model: a causal language model, or a PEFT model around one; it stays as it is.
        include: a folder of task files, looked in first. Task files are programs: their templates and `!function`s run.
        limit: the first so many rows of every single task; None for all.
        seed: of the intervals. Few-shot examples are drawn with lm-eval's own seeds.
        chat: put prompts into the tokenizer's chat template, few-shot examples as turns.
        variables: what the chat template is given besides.
        allow_code: run what the model writes where a task asks for it (HumanEval), and metric scripts of the hub.

    Raises:
        UserError: lm-eval is not installed, or a task cannot be used as it is asked for.
        LorakitError: a dataset cannot be fetched, or lm-eval fails on a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: benchmarks need the package lm-eval: pip install 'lorakit[tasks]'.")
    if limit is not None and limit < 1:
        raise UserError("--limit must be at least 1. Leave it out for all rows.")
    if chat and not tokenizer.chat_template:
        raise UserError("--tasks: this tokenizer has no chat template to put prompts into. Leave --chat-template out.")
    names = list(dict.fromkeys(names))
    from lorakit.evaluate.benchmarks.lm_eval_model import LmEvalModel, quiet_lm_eval, run_lm_eval
    from lorakit.evaluate.benchmarks.task_files import load_tasks

    with quiet_lm_eval(progress):
        loaded = load_tasks(names, include, allow_code)
        lm_eval_model = LmEvalModel(model, tokenizer, batch_size, variables or {}, label, progress)
        try:
            results = run_lm_eval(lm_eval_model, loaded, limit, chat, allow_code)
        except LorakitError:
            raise
        except Exception as error:  # whatever a task's own Python, its template or its data make lm-eval raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise LorakitError(f"--tasks {','.join(names)}: lm-eval fails: {said}") from error
    return _scores(results, loaded, names, seed)


def compare_tasks(
    first: Sequence[TaskScore], second: Sequence[TaskScore], seed: int = 0
) -> dict[str, Comparison | None]:
    """The second model against the first, by figure's name; None for a figure without an interval.

    Raises:
        LorakitError: they were scored on different rows.
    """
    others = {score.name: score for score in second}
    found: dict[str, Comparison | None] = {}
    for one in first:
        other = others.get(one.name)
        if other is None:
            continue
        if one.rows_of != other.rows_of:
            raise LorakitError(
                f"{one.name}: one model was scored on {one.rows} rows and the other on {other.rows}, which are not the "
                "same: a paired difference needs the same rows. Run both with the same --limit and data."
            )
        if one.measure is None or other.measure is None:
            found[one.name] = None
        else:
            found[one.name] = compare({"": one.measure}, {"": other.measure}, seed)[""]
    return found


def _scores(results: Mapping[str, Any], loaded: Mapping[str, Any], names: Sequence[str], seed: int) -> list[TaskScore]:
    from lorakit.evaluate.benchmarks.measures import sample_measures

    within = _within(loaded["groups"], results["results"], names)
    scores: dict[str, list[TaskScore]] = {}
    for name, task in loaded["tasks"].items():
        higher = task.higher_is_better()
        rows, measures = sample_measures(results["samples"][name], task.aggregation(), higher)
        shots = int(task.get_config("num_fewshot") or 0)
        scores[name] = [
            _score(name, key, value, measures.get(key), seed, rows, higher.get(key[0]), shots, within.get(name, ""))
            for key, value in _figures(results["results"][name])
        ]
    for name, group in loaded["groups"].items():
        members = [score for task in group.get_all_tasks() for score in scores[task.task_name]]
        scores[name] = [
            _group_score(name, key, value, group, members, within.get(name, ""), seed)
            for key, value in _figures(results["results"].get(name, {}))
        ]
    return [score for name in results["results"] for score in scores[name]]


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """lm-eval's `metric,filter` keys without the standard errors, which are not asked for."""
    for key, value in result.items():
        metric, comma, taken = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield (metric, taken), float(value)


def _within(groups: Mapping[str, Any], results: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """By task or group, the group with a figure of its own that counts it; without those asked for by name."""
    found: dict[str, str] = {}
    for name, group in groups.items():
        if any(True for _ in _figures(results.get(name, {}))):
            inner = [task.task_name for task in group.get_all_tasks()] + [one.name for one in group.get_all_groups()]
            found |= {member: name for member in inner if member not in found and member not in names}
    return found


def _score(
    name: str,
    key: tuple[str, str],
    value: float,
    measure: Measure | None,
    seed: int,
    rows: tuple[str, ...],
    higher: bool | None,
    shots: int | None,
    within: str,
) -> TaskScore:
    interval = intervals({"": measure}, seed)[""] if measure is not None else None
    taken = "" if key[1] == "none" else key[1]
    return TaskScore(name, key[0], taken, value, interval, len(rows), higher, shots, within, measure, rows)


def _group_score(
    name: str, key: tuple[str, str], value: float, group: Any, members: Sequence[TaskScore], within: str, seed: int
) -> TaskScore:
    """lm-eval weighs a group's tasks by their rows, unless the group says that they count alike."""
    from lorakit.evaluate.benchmarks.measures import group_measure

    counted = [one for one in members if (one.metric, one.filter or "none") == key]
    weighted = all(each.weight_by_size for each in group.aggregate_metric_list if each.metric == key[0])
    measure = group_measure([one.measure for one in counted], weighted)
    rows = tuple(row for one in counted for row in one.rows_of)
    return _score(name, key, value, measure, seed, rows, counted[0].higher, None, within)
