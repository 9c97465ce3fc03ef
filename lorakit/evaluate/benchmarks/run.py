"""Models on lm-eval's tasks: one load of each base, each model against the baseline, as tables and as a document.

Figures are lm-eval's own. Intervals and comparisons are lorakit's, from the value of every sample, because lm-eval's
standard errors are wrong for a share near 0 or 1 and do not compare two models on the same rows.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from lorakit.data.template_source import with_fixed_date
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.inference import ModelLoader, loading_order
from lorakit.evaluate.metric import Comparison, Interval, Measure, Score, compare, intervals, mean, ratio
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import load_tokenizers, prompt_template
from lorakit.evaluate.report import Table, comparison_table, describe_model, document_heading, score_table
from lorakit.progress import Progress
from lorakit.registry import Unit

FORMAT = 1
Key = tuple[str, str]
"""A metric, and the filter that took the answer from what the model wrote; empty where a task has one way only."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks to run, and how. `include`: a folder of task files, searched first; they are programs, whose
    templates and `!function`s run. `limit`: the first rows of every single task, None for all. `chat`: put prompts into
    the chat template, few-shot examples as turns. `allow_code`: run what the model writes where a task asks for it
    (HumanEval), and metric scripts of the hub. `seed`: of the intervals; few-shot examples have lm-eval's own seeds."""

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One figure of one task or group. `interval` is None where the figure is not a function of sums over rows
    (matthews_corrcoef, corpus BLEU). `higher`: whether more is better, None where the task does not say. `shots`:
    examples in the prompt; None for a group. `within`: the group in whose figure this task is counted, empty for what
    was asked for. `rows_of`: a hash of each row; `measure` holds what each of them adds, in the same order."""

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


def run_benchmark(
    model_set: ModelSet, settings: BenchmarkSettings, baseline: str, progress: Progress
) -> tuple[dict[str, Any], list[Table]]:
    """Every model on every task, as a document and as tables. `baseline`: the name of the model that the others are
    compared with. An error if lm-eval is not installed, or a task cannot be used in this way or fails."""
    served = [spec.given for spec in model_set.specs if spec.endpoint]
    if served:
        raise UserError(
            f"{served[0]}: lm-eval's tasks need likelihoods, which a server's chat answers have not. Leave it out; "
            "lorakit eval scores its answers."
        )
    files = [spec.given for spec in model_set.specs if spec.gguf]
    if files:
        raise UserError(
            f"{files[0]}: lm-eval's tasks run on models of torch here, not on GGUF files. Leave it out, or give the "
            "folder that it was made from; lorakit eval scores GGUF files."
        )
    loader, tokenizers = ModelLoader(model_set.machine.device), load_tokenizers(model_set, progress)
    scores: dict[str, list[TaskScore]] = {spec.name: [] for spec in model_set.specs}
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        template = prompt_template(spec, tokenizers[at], model_set)
        tokenizer, label = with_fixed_date(tokenizers[at], template.date), f"{spec.name}: tasks"
        scores[spec.name] = run_tasks(loader.model_of(spec), tokenizer, settings, progress, template.variables, label)
    others = {name: of_model for name, of_model in scores.items() if name != baseline}
    compared = {name: compare_tasks(scores[baseline], of_model, settings.seed) for name, of_model in others.items()}
    machine = model_set.machine
    document = {
        **document_heading(FORMAT, machine),
        "settings": asdict(settings) | {"include": str(settings.include) if settings.include else None},
        "baseline": baseline,
        "subjects": {spec.name: describe_model(spec, machine.device) for spec in model_set.specs},
        "models": {name: [score.to_dict() for score in of_model] for name, of_model in scores.items()},
        "comparisons": {
            model: {name: one and one.to_dict() for name, one in of_model.items()}
            for model, of_model in compared.items()
        },
    }
    # The figures asked for with models as columns, and each model against the baseline.
    by_model = {model: {one.name: one for one in of_model if not one.within} for model, of_model in scores.items()}
    tables = [score_table("benchmarks", by_model)]
    for model, of_model in compared.items():
        scored = [(name, of_model.get(name), one.measure) for name, one in by_model[baseline].items()]
        rows = [(name, one, measure) for name, one, measure in scored if one and measure]
        tables += [comparison_table(f"{model} against {baseline}", rows)] if rows else []
    return document, tables


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: BenchmarkSettings,
    progress: Progress,
    variables: Mapping[str, Any] | None = None,
    label: str = "tasks",
) -> list[TaskScore]:
    """The figures of these tasks, groups and their members, in lm-eval's order. `model`: a causal language model, or a
    PEFT model around one; it stays as it is. `variables`: what the chat template is given besides the messages."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: benchmarks need the package lm-eval: pip install 'lorakit[tasks]'.")
    if settings.chat and not tokenizer.chat_template:
        raise UserError("--tasks: this tokenizer has no chat template to put prompts into. Leave --chat-template out.")
    names = list(dict.fromkeys(settings.tasks))
    from lorakit.evaluate.benchmarks.harness import LmEvalModel, load_tasks, quiet_lm_eval, run_lm_eval

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
    return _task_scores(results, loaded, names, settings.seed)


def compare_tasks(
    first: Sequence[TaskScore], second: Sequence[TaskScore], seed: int = 0
) -> dict[str, Comparison | None]:
    """The second model against the first, by figure's name; None for a figure without an interval. An error if they
    have different rows."""
    others = {score.name: score for score in second}
    comparisons: dict[str, Comparison | None] = {}
    for one, other in ((one, others[one.name]) for one in first if one.name in others):
        if one.rows_of != other.rows_of:
            raise LorakitError(
                f"{one.name}: one model was scored on {len(one.rows_of)} rows and the other on {len(other.rows_of)}, "
                "which are not the same: a paired difference needs the same. Run both with the same --limit and data."
            )
        comparisons[one.name] = None
        if one.measure is not None and other.measure is not None:
            comparisons[one.name] = compare({"": one.measure}, {"": other.measure}, seed)[""]
    return comparisons


def _task_scores(
    results: Mapping[str, Any], loaded: Mapping[str, Any], names: Sequence[str], seed: int
) -> list[TaskScore]:
    """All of lm-eval's figures, in its order. `loaded`: its tasks and groups; `names`: those asked for."""
    scores: dict[str, list[TaskScore]] = {name: [] for name in results["results"]}
    within: dict[str, str] = {}  # by task or group not asked for, the group with a figure of its own that counts it
    for name, group in loaded["groups"].items():
        if any(True for _ in _figures(results["results"].get(name, {}))):
            inner = [task.task_name for task in group.get_all_tasks()] + [one.name for one in group.get_all_groups()]
            within |= {member: name for member in inner if member not in within and member not in names}

    def add(name: str, key: Key, value: float, higher: Any, shots: int | None, measure: Any, rows: list[str]) -> None:
        interval = intervals({"": measure}, seed)[""] if measure is not None else None
        group = within.get(name, "")
        scores[name].append(TaskScore(name, *key, value, higher, shots, group, measure, interval, rows))

    for name, task in loaded["tasks"].items():
        higher, shots = task.higher_is_better(), int(task.get_config("num_fewshot") or 0)
        rows, measures = _sample_measures(results["samples"][name], task.aggregation(), higher)
        for key, value in _figures(results["results"][name]):
            add(name, key, value, higher.get(key[0]), shots, measures.get(key), rows)
    for name, group in loaded["groups"].items():
        for key, value in _figures(results["results"].get(name, {})):
            of_tasks = [one for task in group.get_all_tasks() for one in scores[task.task_name]]
            members = [one for one in of_tasks if (one.metric, one.filter) == key]
            # lm-eval weighs a group's tasks by their rows, unless the group says that they count alike.
            weighted = all(each.weight_by_size for each in group.aggregate_metric_list if each.metric == key[0])
            measure = _group_measure([one.measure for one in members], weighted)
            add(name, key, value, members[0].higher, None, measure, [row for one in members for row in one.rows_of])
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
