"""Models on lm-eval's tasks: one load of each base, each model against the baseline, as tables and as a document."""

from dataclasses import asdict, dataclass
from typing import Any

from lorakit.data.template_source import with_fixed_date
from lorakit.evaluate.benchmarks.tasks import BenchmarkSettings, TaskScore, compare_tasks, run_tasks
from lorakit.evaluate.inference import ModelLoader, loading_order
from lorakit.evaluate.intervals import Comparison
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import load_tokenizers, prompt_template
from lorakit.evaluate.report import (
    COMPARISON_COLUMNS,
    Table,
    comparison_row,
    describe_model,
    score_table,
    without_nan,
)
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FORMAT = 1


@dataclass(frozen=True, eq=False)
class BenchmarkResults:
    """The figures of every model, and the comparison of each other one with the baseline, by figure."""

    model_set: ModelSet
    settings: BenchmarkSettings
    baseline: str
    scores: dict[str, list[TaskScore]]
    comparisons: dict[str, dict[str, Comparison | None]]


def run_benchmark(
    model_set: ModelSet, settings: BenchmarkSettings, baseline: str, progress: Progress
) -> BenchmarkResults:
    """Every model on every task. `baseline`: the name of the model that the others are compared with.

    Raises:
        UserError: lm-eval is not installed, or a task cannot be used in this way.
        LorakitError: a dataset could not be fetched, or lm-eval fails on a task.
    """
    loader, tokenizers = ModelLoader(model_set.machine.device), load_tokenizers(model_set, progress)
    in_any_order = {}
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        template = prompt_template(spec, tokenizers[at], model_set)
        tokenizer, variables = with_fixed_date(tokenizers[at], template.date), template.variables
        label = f"{spec.name}: tasks"
        in_any_order[spec.name] = run_tasks(loader.model_of(spec), tokenizer, settings, progress, variables, label)
    scores = {spec.name: in_any_order[spec.name] for spec in model_set.specs}
    comparisons = {
        name: compare_tasks(scores[baseline], of_model, settings.seed)
        for name, of_model in scores.items()
        if name != baseline
    }
    return BenchmarkResults(model_set, settings, baseline, scores, comparisons)


def benchmark_tables(results: BenchmarkResults) -> list[Table]:
    """The figures asked for with models as columns, and each model against the baseline."""
    by_model = {
        model: {score.name: score for score in scores if not score.within} for model, scores in results.scores.items()
    }
    tables = [score_table("benchmarks", by_model)]
    for model, compared in results.comparisons.items():
        rows = []
        for name, score in by_model[results.baseline].items():
            comparison = compared.get(name)
            if comparison is not None and score.measure is not None:
                rows.append(comparison_row(name, comparison, score.measure))
        if rows:
            tables.append((f"{model} against {results.baseline}", COMPARISON_COLUMNS, rows))
    return tables


def benchmark_document(results: BenchmarkResults) -> dict[str, Any]:
    """All figures, those of members of groups too; NaN is null."""
    settings, machine = results.settings, results.model_set.machine
    facts: dict[str, Any] = {
        "format": FORMAT,
        "taken": now(),
        "versions": versions(),
        "machine": {"device": machine.device, "name": machine.name},
        "settings": asdict(settings) | {"include": str(settings.include) if settings.include else None},
        "baseline": results.baseline,
        "subjects": {spec.name: describe_model(spec, machine.device) for spec in results.model_set.specs},
        "models": {name: [score.to_dict() for score in scores] for name, scores in results.scores.items()},
        "comparisons": {
            model: {name: one and one.to_dict() for name, one in compared.items()}
            for model, compared in results.comparisons.items()
        },
    }
    document: dict[str, Any] = without_nan(facts)
    return document
