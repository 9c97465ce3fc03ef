"""Subjects on lm-eval's tasks: one load for each base, figures with intervals, each model against the baseline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.data.template_source import with_fixed_date
from lorakit.evaluate.benchmarks.tasks import TaskScore, compare_tasks, run_tasks
from lorakit.evaluate.inference import ModelLoader, loading_order
from lorakit.evaluate.intervals import Comparison
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import load_tokenizers, prompt_template
from lorakit.evaluate.report import COMPARISON_COLUMNS, Table, comparison_row, describe_model, without_nan
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FORMAT = 1
_ROWS = 8


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks to run, and how."""

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class BenchmarkResults:
    """The figures of every subject, and what sets each other one apart from the baseline."""

    model_set: ModelSet
    settings: BenchmarkSettings
    baseline: str
    scores: dict[str, list[TaskScore]]
    comparisons: dict[str, dict[str, Comparison | None]]


def run_benchmark(
    model_set: ModelSet, settings: BenchmarkSettings, baseline: str, progress: Progress
) -> BenchmarkResults:
    """Every subject on every task.

    Args:
        baseline: the name of the subject that the others are compared with.

    Raises:
        UserError: lm-eval is not installed, or a task cannot be used as it is asked for.
        LorakitError: a dataset cannot be fetched, or lm-eval fails on a task.
    """
    loaded, found, tokenizers = ModelLoader(model_set.machine.device), {}, load_tokenizers(model_set, progress)
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        template = prompt_template(spec, tokenizers[at], model_set)
        found[spec.name] = run_tasks(
            loaded.model_of(spec),
            with_fixed_date(tokenizers[at], template.date),
            settings.tasks,
            settings.include,
            settings.limit,
            _ROWS,
            progress,
            settings.seed,
            chat=settings.chat,
            variables=template.variables if settings.chat else {},
            allow_code=settings.allow_code,
            label=f"{spec.name}: tasks",
        )
    scores = {spec.name: found[spec.name] for spec in model_set.specs}
    others = {name: compare_tasks(scores[baseline], one, settings.seed) for name, one in scores.items()}
    del others[baseline]
    return BenchmarkResults(model_set, settings, baseline, scores, others)


def benchmark_tables(results: BenchmarkResults) -> list[Table]:
    """What was asked for as columns of models, and each model against the baseline."""
    first = {score.name: score for score in results.scores[results.baseline] if not score.within}
    cells = [[name, *(_shown(name, scores) for scores in results.scores.values())] for name in first]
    tables: list[Table] = [("benchmarks", ["", *results.scores], cells)]
    for model, compared in results.comparisons.items():
        rows = []
        for name, one in compared.items():
            measure = first[name].measure if name in first else None
            if one is not None and measure is not None:
                rows.append(comparison_row(name, one, measure))
        if rows:
            tables.append((f"{model} against {results.baseline}", COMPARISON_COLUMNS, rows))
    return tables


def benchmark_document(results: BenchmarkResults) -> dict[str, Any]:
    """All figures, of members of groups too; figures that are no numbers are null."""
    settings = asdict(results.settings) | {
        "include": str(results.settings.include) if results.settings.include else None
    }
    machine = results.model_set.machine
    facts: dict[str, Any] = {
        "format": FORMAT,
        "taken": now(),
        "versions": versions(),
        "machine": {"device": machine.device, "name": machine.name},
        "settings": settings,
        "baseline": results.baseline,
        "subjects": {spec.name: describe_model(spec, machine.device) for spec in results.model_set.specs},
        "models": {name: [_facts(score) for score in scores] for name, scores in results.scores.items()},
        "comparisons": {
            model: {name: one and one.to_dict() for name, one in compared.items()}
            for model, compared in results.comparisons.items()
        },
    }
    found: dict[str, Any] = without_nan(facts)
    return found


def _facts(score: TaskScore) -> dict[str, Any]:
    interval = score.interval
    return {
        "task": score.task,
        "metric": score.metric,
        "filter": score.filter,
        "value": score.value,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "rows": score.rows,
        "higher_is_better": score.higher,
        "shots": score.shots,
        "within": score.within,
    }


def _shown(name: str, scores: Sequence[TaskScore]) -> str:
    score = next((one for one in scores if one.name == name), None)
    if score is None:
        return "-"
    if score.interval is None or score.measure is None:
        return f"{score.value:.4g}"
    write = score.measure.write
    return f"{write(score.value)} ({write(score.interval.low)} to {write(score.interval.high)})"
