"""lm-eval's tasks on a model in memory, with an interval for each figure.

Figures are lm-eval's own. Intervals and comparisons are lorakit's, from the value of every sample, because lm-eval's
standard errors are wrong for a share near 0 or 1 and do not compare two models on the same rows.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.intervals import Comparison, Interval, compare, intervals
from lorakit.evaluate.metric import Measure
from lorakit.evaluate.results import Score
from lorakit.progress import Progress


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks to run, and how.

    `include`: a folder of task files, searched first; they are programs, whose templates and `!function`s run. `limit`:
    the first rows of every single task, None for all. `chat`: put prompts into the chat template, few-shot examples as
    turns. `allow_code`: run what the model writes where a task asks for it (HumanEval), and metric scripts of the hub.
    `seed`: of the intervals; few-shot examples are drawn with lm-eval's own seeds.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One figure of one task or group.

    `filter` says how the answer was taken from what the model wrote; empty where a task has one way only. `interval`
    is None where the figure is not a function of sums over rows (matthews_corrcoef, corpus BLEU). `higher`: whether
    more is better, None where the task does not say. `shots`: examples in the prompt; None for a group. `within`: the
    group in whose figure this task is counted, empty for what was asked for. `rows_of`: a hash of each row; `measure`
    holds what each of them adds, in the same order.
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

    def __str__(self) -> str:
        if self.interval is None or self.measure is None:
            return f"{self.value:.4g}"
        return str(Score(self.measure, self.interval))

    def to_dict(self) -> dict[str, Any]:
        """The figure in a benchmark's document."""
        return {
            "task": self.task,
            "metric": self.metric,
            "filter": self.filter,
            "value": self.value,
            "low": self.interval.low if self.interval else None,
            "high": self.interval.high if self.interval else None,
            "rows": self.rows,
            "higher_is_better": self.higher,
            "shots": self.shots,
            "within": self.within,
        }


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: BenchmarkSettings,
    progress: Progress,
    variables: Mapping[str, Any] | None = None,
    label: str = "tasks",
) -> list[TaskScore]:
    """The figures of these tasks, groups and their members, in lm-eval's order.

    Args:
        model: a causal language model, or a PEFT model around one; it stays as it is.
        variables: what the chat template is given besides the messages.

    Raises:
        UserError: lm-eval is not installed, or a task cannot be used in this way.
        LorakitError: a dataset could not be fetched, or lm-eval fails on a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: benchmarks need the package lm-eval: pip install 'lorakit[tasks]'.")
    if settings.chat and not tokenizer.chat_template:
        raise UserError("--tasks: this tokenizer has no chat template to put prompts into. Leave --chat-template out.")
    names = list(dict.fromkeys(settings.tasks))
    from lorakit.evaluate.benchmarks.lm_eval_model import LmEvalModel, quiet_lm_eval, run_lm_eval
    from lorakit.evaluate.benchmarks.task_files import load_tasks

    with quiet_lm_eval(progress):
        loaded = load_tasks(names, settings.include, settings.allow_code)
        lm_eval_model = LmEvalModel(model, tokenizer, variables if settings.chat else None, label, progress)
        try:
            results = run_lm_eval(lm_eval_model, loaded, settings.limit, settings.chat, settings.allow_code)
        except LorakitError:
            raise
        except Exception as error:  # whatever a task's own Python, its template or its data make lm-eval raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise LorakitError(f"--tasks {','.join(names)}: lm-eval fails: {reason}") from error
    return _scores(results, loaded, names, settings.seed)


def compare_tasks(
    first: Sequence[TaskScore], second: Sequence[TaskScore], seed: int = 0
) -> dict[str, Comparison | None]:
    """The second model against the first, by figure's name; None for a figure without an interval.

    Raises:
        LorakitError: they were scored on different rows.
    """
    others = {score.name: score for score in second}
    comparisons: dict[str, Comparison | None] = {}
    for one in first:
        other = others.get(one.name)
        if other is None:
            continue
        if one.rows_of != other.rows_of:
            raise LorakitError(
                f"{one.name}: one model was scored on {one.rows} rows and the other on {other.rows}, which are not the "
                "same: a paired difference needs the same rows. Run both with the same --limit and data."
            )
        comparisons[one.name] = None
        if one.measure is not None and other.measure is not None:
            comparisons[one.name] = compare({"": one.measure}, {"": other.measure}, seed)[""]
    return comparisons


def _scores(results: Mapping[str, Any], loaded: Mapping[str, Any], names: Sequence[str], seed: int) -> list[TaskScore]:
    from lorakit.evaluate.benchmarks.measures import group_measure, sample_measures

    within = _find_groups(loaded["groups"], results["results"], names)
    score, scores = partial(_score, within=within, seed=seed), dict[str, list[TaskScore]]()
    for name, task in loaded["tasks"].items():
        higher = task.higher_is_better()
        rows, measures = sample_measures(results["samples"][name], task.aggregation(), higher)
        shots = int(task.get_config("num_fewshot") or 0)
        scores[name] = [
            score(name, key, value, measures.get(key), rows, higher.get(key[0]), shots)
            for key, value in _figures(results["results"][name])
        ]
    for name, group in loaded["groups"].items():
        scores[name] = []
        for key, value in _figures(results["results"].get(name, {})):
            of_tasks = [one for task in group.get_all_tasks() for one in scores[task.task_name]]
            members = [one for one in of_tasks if (one.metric, one.filter or "none") == key]
            # lm-eval weighs a group's tasks by their rows, unless the group says that they count alike.
            weighted = all(each.weight_by_size for each in group.aggregate_metric_list if each.metric == key[0])
            measure = group_measure([one.measure for one in members], weighted)
            rows = tuple(row for one in members for row in one.rows_of)
            scores[name].append(score(name, key, value, measure, rows, members[0].higher, None))
    return [one for name in results["results"] for one in scores[name]]


def _score(
    name: str,
    key: tuple[str, str],
    value: float,
    measure: Measure | None,
    rows: tuple[str, ...],
    higher: bool | None,
    shots: int | None,
    within: Mapping[str, str],
    seed: int,
) -> TaskScore:
    interval = intervals({"": measure}, seed)[""] if measure is not None else None
    metric, answer_filter = key[0], "" if key[1] == "none" else key[1]
    group = within.get(name, "")
    return TaskScore(name, metric, answer_filter, value, interval, len(rows), higher, shots, group, measure, rows)


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """The values of lm-eval's `metric,filter` keys, without its standard errors."""
    for key, value in result.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield (metric, answer_filter), float(value)


def _find_groups(groups: Mapping[str, Any], results: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """By task or group, the group with a figure of its own that counts it; without those asked for by name."""
    group_of: dict[str, str] = {}
    for name, group in groups.items():
        if any(True for _ in _figures(results.get(name, {}))):
            inner = [task.task_name for task in group.get_all_tasks()] + [one.name for one in group.get_all_groups()]
            group_of |= {member: name for member in inner if member not in group_of and member not in names}
    return group_of
