"""`lorakit eval`"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Quiet
from lorakit.cli.scoring import (
    NOT_STORED,
    Baseline,
    MaxNewTokens,
    Models,
    NoCache,
    Output,
    Quantizations,
    open_models,
    results_folder,
)
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.evaluate.results import Evaluation

_WRONG = "What may have gone wrong"


def evaluate(
    models: Models = [],  # noqa: B006
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows to score on, instead of the first run's held-out rows."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="A,B", help="Metrics of generated answers, instead of the recipe's."),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="Score the first N rows.")] = None,
    baseline: Baseline = None,
    fail_under: Annotated[
        list[str],
        typer.Option(
            "--fail-under",
            metavar="METRIC=VALUE",
            help="Exit with 1 where a model's score is worse, except the baseline. May be given several times.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the intervals.")] = 0,
    no_cache: NoCache = False,
    output: Output = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Also score general texts and training rows, to see forgetting and memorization.",
            rich_help_panel=_WRONG,
        ),
    ] = False,
    general: Annotated[
        Path | None,
        typer.Option(
            "--general",
            metavar="FILE",
            help="General texts of your own, rows with 'text', instead of the bundled ones.",
            rich_help_panel=_WRONG,
        ),
    ] = None,
    quantizations: Quantizations = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models side by side on the same held-out rows.

    Loss and perplexity are taken on every trained token, metrics on greedy answers, each with its 95 % interval; then
    each model's difference from the baseline, and whether it is better. Scores and answers are stored in the run's
    eval/ folder.
    """
    from lorakit import console
    from lorakit.cli.eval_metrics import check_metrics, failures, metrics_of, thresholds_of

    progress = console.Terminal(quiet)
    if metrics is not None:
        check_metrics(metrics)
    with open_models(models, quantizations, progress) as model_set:
        from lorakit.evaluate.diagnosis.examination import create_examination, describe_flagged
        from lorakit.evaluate.report import evaluation_document, write_evaluation
        from lorakit.evaluate.run import default_settings, score_models

        recipe = default_settings(model_set.prepared)
        settings = replace(
            recipe,
            metrics=recipe.metrics if metrics is None else metrics_of(metrics, recipe.metrics),
            rows=rows or recipe.rows,
            max_new_tokens=max_new_tokens or recipe.max_new_tokens,
            seed=seed,
            cache=not no_cache,
            baseline=baseline,
        )
        examined = create_examination(model_set, general) if diagnose or general else None
        thresholds = thresholds_of(fail_under, settings.metrics)
        folder = results_folder(model_set, output)
        evaluation = score_models(model_set, data, settings, progress, examined)
        failed = failures(evaluation, thresholds)
        path = write_evaluation(evaluation, folder) if folder else None
    if as_json:
        console.result_json({**evaluation_document(evaluation), "file": str(path) if path else None, "failed": failed})
    else:
        _print(evaluation, path)
    for text in describe_flagged(evaluation.findings):
        progress.warn(text)
    if failed:
        raise LorakitError(f"--fail-under: {'; '.join(failed)}.")


def _print(evaluation: "Evaluation", path: Path | None) -> None:
    from lorakit import console
    from lorakit.evaluate.report import tables

    model_set = evaluation.model_set
    title = str(model_set.prepared.recipe.name) if model_set.prepared else ", ".join(evaluation.scores)
    quantizations = {model.spec.settings.quantization for model in evaluation.models} - {"none"}
    title += f" (base in {', '.join(sorted(quantizations))})" if quantizations else ""
    for name, columns, cells in tables(evaluation, title):
        console.result_table(name, columns, cells)
    console.result(f"every answer: {path.with_suffix('.jsonl')}" if path else NOT_STORED)
