"""`lorakit eval`"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.eval_options import (
    AllowCode,
    Baseline,
    ChatTemplate,
    DataFile,
    Diagnose,
    FailUnder,
    General,
    KeyFile,
    Limit,
    MaxNewTokens,
    Metrics,
    Models,
    NoCache,
    Output,
    Overwrite,
    Quantizations,
    Questions,
    RatingFiles,
    Rows,
    Seed,
    SheetFolder,
    Tasks,
    TasksPath,
)
from lorakit.cli.options import Json, Quiet
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.evaluate.examined import Examination
    from lorakit.evaluate.models import ModelSet
    from lorakit.evaluate.results import EvalSettings, Evaluation
    from lorakit.progress import Progress


@dataclass(frozen=True)
class _Chosen:
    """The options that change how is scored; None where the recipe decides."""

    metrics: str | None
    rows: int | None
    max_new_tokens: int | None
    seed: int
    cache: bool
    baseline: str | None


def evaluate(
    models: Models = [],  # noqa: B006
    data: DataFile = None,
    metrics: Metrics = None,
    rows: Rows = None,
    baseline: Baseline = None,
    fail_under: FailUnder = [],  # noqa: B006
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    no_cache: NoCache = False,
    output: Output = None,
    sheet: SheetFolder = None,
    questions: Questions = None,
    overwrite: Overwrite = False,
    ratings: RatingFiles = [],  # noqa: B006
    key: KeyFile = None,
    diagnose: Diagnose = False,
    general: General = None,
    quantizations: Quantizations = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    limit: Limit = None,
    chat_template: ChatTemplate = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models side by side on the same held-out rows.

    Loss and perplexity are taken on every trained token, metrics on greedy answers, each with its 95 % interval; then
    each model's difference from the baseline, and whether it is better. Scores and answers are kept in the run's
    eval/ folder.
    """
    apart = ("models", "seed", "as_json", "quiet")
    options = {f"--{name.replace('_', '-')}": value for name, value in locals().items() if name not in apart}
    from lorakit import console
    from lorakit.cli import eval_parts as parts
    from lorakit.cli.eval_checks import check_together, quantizations_of

    progress = console.Terminal(quiet)
    check_together(models, options)
    if ratings and key:
        parts.report_ratings([*ratings, *map(Path, models)], key, seed, as_json, progress)
        return
    words = quantizations_of(quantizations)
    if metrics is not None:
        _check_metrics(metrics)
    benchmark = None
    if tasks is not None:
        benchmark = parts.benchmark_of(tasks, tasks_path, limit, chat_template, allow_code, seed)
    from lorakit.evaluate.models import add_quantizations, lock_runs, resolve_models

    with lock_runs(models):
        model_set = resolve_models(models, progress)
        if words:
            model_set = add_quantizations(model_set, words)
        settings = _request(model_set, _Chosen(metrics, rows, max_new_tokens, seed, not no_cache, baseline))
        if sheet and questions:
            parts.write_questions_sheet(model_set, settings, sheet, questions, overwrite, as_json, progress)
        elif benchmark:
            parts.report_benchmark(model_set, benchmark, baseline, output, as_json, progress)
        else:
            examined = _examination(model_set, general) if diagnose or general else None
            _score(model_set, settings, data, fail_under, output, examined, as_json, progress)


def _examination(model_set: "ModelSet", general: Path | None) -> "Examination":
    from lorakit.evaluate.examined import examination

    return examination(model_set, general)


def _check_metrics(named: str) -> None:
    """Refuse an unknown metric before anything is read; settings are looked up when the recipe is known."""
    from lorakit.cli.eval_values import metrics_of
    from lorakit.registry import METRICS

    known = [name for name in METRICS.names() if METRICS[name].settings]
    metrics_of(named, known)


def _request(model_set: "ModelSet", chosen: _Chosen) -> "EvalSettings":
    from dataclasses import replace

    from lorakit.cli.eval_values import metrics_of
    from lorakit.evaluate.run import default_settings

    settings = default_settings(model_set.prepared)
    metrics = metrics_of(chosen.metrics, settings.metrics) if chosen.metrics is not None else settings.metrics
    return replace(
        settings,
        metrics=metrics,
        rows=chosen.rows or settings.rows,
        max_new_tokens=chosen.max_new_tokens or settings.max_new_tokens,
        seed=chosen.seed,
        cache=chosen.cache,
        baseline=chosen.baseline,
    )


def _score(
    model_set: "ModelSet",
    settings: "EvalSettings",
    data: Path | None,
    fail_under: list[str],
    output: Path | None,
    examination: "Examination | None",
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.cli.eval_parts import folder_of
    from lorakit.cli.eval_values import failures, thresholds_of
    from lorakit.evaluate.examined import flagged
    from lorakit.evaluate.report_files import evaluation_document, write_evaluation
    from lorakit.evaluate.run import score_models

    thresholds = thresholds_of(fail_under, settings.metrics)
    folder = folder_of(model_set, output)
    evaluation = score_models(model_set, data, settings, progress, examination)
    failed = failures(evaluation, thresholds)
    path = write_evaluation(evaluation, folder) if folder else None
    if as_json:
        console.result_json({**evaluation_document(evaluation), "file": str(path) if path else None, "failed": failed})
    else:
        _print(evaluation, path)
    for text in flagged(evaluation.findings):
        progress.warn(text)
    if failed:
        raise LorakitError(f"--fail-under: {'; '.join(failed)}.")


def _print(evaluation: "Evaluation", path: Path | None) -> None:
    from lorakit import console
    from lorakit.cli.eval_parts import NOT_KEPT
    from lorakit.evaluate.table import tables

    model_set = evaluation.model_set
    title = str(model_set.prepared.recipe.name) if model_set.prepared else ", ".join(evaluation.scores)
    held = {model.spec.settings.quantization for model in evaluation.models} - {"none"}
    for name, columns, cells in tables(evaluation, title + (f" (base in {', '.join(sorted(held))})" if held else "")):
        console.result_table(name, columns, cells)
    console.result(f"every answer: {path.with_suffix('.jsonl')}" if path else NOT_KEPT)
