"""`lorakit eval`"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.evaluate.benchmarks import Benchmark
    from lorakit.evaluate.evaluation import Evaluation, Request
    from lorakit.evaluate.examined import Examination
    from lorakit.evaluate.subjects import Lineup
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
    from lorakit import console

    progress = console.Terminal(quiet)
    _check_together(models, sheet, questions, ratings, key, overwrite)
    _check_tasks(tasks, tasks_path, limit, chat_template, allow_code)
    if ratings:
        _report_ratings([*ratings, *map(Path, models)], key, seed, as_json, progress)
        return
    chosen = _Chosen(metrics, rows, max_new_tokens, seed, not no_cache, baseline)
    if metrics:
        _check_metrics(metrics)
    words = _quantizations(quantizations)
    from lorakit.evaluate.subjects import line_up, on_quantizations

    lineup = line_up(models, progress)
    if words:
        lineup = on_quantizations(lineup, words)
    request = _request(lineup, chosen)
    if sheet and questions:
        _write_sheet(lineup, request, sheet, questions, overwrite, as_json, progress)
        return
    if tasks:
        from lorakit.evaluate.benchmarks import Benchmark

        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        benchmark = Benchmark(names, tasks_path, limit, chat_template, allow_code, seed)
        _run_benchmark(lineup, benchmark, baseline, output, as_json, progress)
        return
    from lorakit.evaluate.examined import Examination

    examination = Examination(lineup, general) if diagnose or general else None
    if examination is not None:
        _ = examination.texts  # a file that cannot be read is told before models are loaded
    _score(lineup, request, data, fail_under, output, examination, as_json, progress)


def _check_tasks(tasks: str | None, path: Path | None, limit: int | None, chat: bool, code: bool) -> None:
    """Options of benchmarks mean nothing without one."""
    given = {"--tasks-path": path, "--limit": limit, "--chat-template": chat, "--allow-code": code}
    for name, value in given.items():
        if value and not tasks:
            raise UserError(f"{name}: says nothing without --tasks.")


def _quantizations(named: str | None) -> list[str]:
    from lorakit.tables import QUANTIZERS

    words = [word.strip() for word in named.split(",")] if named else []
    for word in words:
        if word not in QUANTIZERS:
            raise UserError(f"--quantizations: {word!r} is none. Write some of {', '.join(QUANTIZERS.names())}.")
    return list(dict.fromkeys(words))


def _run_benchmark(
    lineup: "Lineup",
    benchmark: "Benchmark",
    baseline: str | None,
    output: Path | None,
    as_json: bool,
    progress: "Progress",
) -> None:
    import json

    from lorakit import console
    from lorakit.evaluate.benchmarks import benchmark_document, benchmark_tables, run_benchmark
    from lorakit.evaluate.run import baseline_of
    from lorakit.folders import write_whole

    name = lineup.subjects[baseline_of(lineup, baseline)].name
    done = run_benchmark(lineup, benchmark, name, progress)
    folder = output or (lineup.run.evaluations if lineup.run else None)
    document = benchmark_document(done)
    path = folder / f"tasks-{document['taken'][:19].replace('-', '').replace(':', '')}.json" if folder else None
    if path:
        write_whole(path, json.dumps(document, indent=2) + "\n")
    if as_json:
        console.result_json({**document, "file": str(path) if path else None})
        return
    for table in benchmark_tables(done):
        console.result_table(*table)
    if path:
        console.result(f"all figures: {path}")


def _check_together(
    models: list[str],
    sheet: Path | None,
    questions: Path | None,
    ratings: list[Path],
    key: Path | None,
    overwrite: bool,
) -> None:
    """Options that belong together, or exclude each other."""
    if bool(ratings) != bool(key):
        given, lacking = ("--ratings", "--key FILE, the sheet's key.json") if ratings else ("--key", "--ratings FILE")
        raise UserError(f"{given}: says nothing alone. Give {lacking} too.")
    if bool(sheet) != bool(questions):
        given, lacking = ("--sheet", "--questions FILE") if sheet else ("--questions", "--sheet DIR")
        raise UserError(f"{given}: says nothing alone. Give {lacking} too.")
    if ratings and sheet:
        raise UserError("--ratings and --sheet exclude each other: a sheet is written first, and rated then.")
    if overwrite and not sheet:
        raise UserError("--overwrite: is for --sheet; an evaluation overwrites nothing.")
    if not models and not ratings:
        raise UserError("nothing is named to be scored. Give the folder of a run, such as runs/NAME.")


def _check_metrics(named: str) -> None:
    """Refuse an unknown metric before anything is read; settings are looked up when the recipe is known."""
    from lorakit.cli.eval_values import metrics_of
    from lorakit.tables import METRICS

    known = [name for name in METRICS.names() if METRICS[name].facts.get("settings")]
    metrics_of(named, known)


def _request(lineup: "Lineup", chosen: _Chosen) -> "Request":
    from dataclasses import replace

    from lorakit.cli.eval_values import metrics_of
    from lorakit.evaluate.run import request_of

    request = request_of(lineup.prepared)
    metrics = metrics_of(chosen.metrics, request.metrics) if chosen.metrics is not None else request.metrics
    return replace(
        request,
        metrics=metrics,
        rows=chosen.rows or request.rows,
        max_new_tokens=chosen.max_new_tokens or request.max_new_tokens,
        seed=chosen.seed,
        cache=chosen.cache,
        baseline=chosen.baseline,
    )


def _score(
    lineup: "Lineup",
    request: "Request",
    data: Path | None,
    fail_under: list[str],
    output: Path | None,
    examination: "Examination | None",
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.cli.eval_values import failures, thresholds_of
    from lorakit.evaluate.examined import flagged
    from lorakit.evaluate.run import score_lineup
    from lorakit.evaluate.written import document, write_evaluation

    thresholds = thresholds_of(fail_under, request.metrics)
    folder = output or (lineup.run.evaluations if lineup.run else None)
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder}: is a file. Give a folder.")
    evaluation = score_lineup(lineup, data, request, progress, examination)
    failed = failures(evaluation, thresholds)
    path = write_evaluation(evaluation, folder) if folder else None
    if as_json:
        console.result_json({**document(evaluation), "file": str(path) if path else None, "failed": failed})
    else:
        _print(evaluation, path)
        for text in flagged(evaluation.findings):
            progress.warn(text)
    if failed:
        raise LorakitError(f"--fail-under: {'; '.join(failed)}.")


def _print(evaluation: "Evaluation", path: Path | None) -> None:
    from lorakit import console
    from lorakit.evaluate.table import tables

    lineup = evaluation.lineup
    title = str(lineup.prepared.recipe.name) if lineup.prepared else ", ".join(evaluation.scores)
    held = {model.subject.settings.quantization for model in evaluation.models} - {"none"}
    for name, columns, cells in tables(evaluation, title + (f" (base in {', '.join(sorted(held))})" if held else "")):
        console.result_table(name, columns, cells)
    if path:
        console.result(f"every answer: {path.with_suffix('.jsonl')}")
    else:
        console.result("not kept: no run is among these, and --output DIR says where scores and answers go")


def _write_sheet(
    lineup: "Lineup",
    request: "Request",
    folder: Path,
    file: Path,
    overwrite: bool,
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.evaluate.questioning import answers_to_questions
    from lorakit.evaluate.questions import read_questions
    from lorakit.evaluate.sheet import write_sheet

    questions = read_questions(file)
    if len(lineup.subjects) < 2:
        raise UserError(f"--sheet: compares the answers of several models, and {lineup.subjects[0].given} is one.")
    answers = answers_to_questions(lineup, questions, request, progress)
    name = str(lineup.prepared.recipe.name) if lineup.prepared else folder.name
    sheet = write_sheet(folder, name, questions, answers, request.seed, overwrite)
    if as_json:
        console.result_json(sheet.to_dict())
        return
    console.result(
        f"for raters: {sheet.page} ({sheet.questions} questions, {sheet.answers} answers)\n"
        f"keep to yourself: {sheet.key}\n"
        f"then: lorakit eval --ratings ratings-*.json --key {sheet.key}"
    )


def _report_ratings(files: list[Path], key: Path | None, seed: int, as_json: bool, progress: "Progress") -> None:
    from lorakit import console
    from lorakit.evaluate.judgement import report
    from lorakit.evaluate.ratings import read_ratings

    assert key is not None
    ratings = read_ratings(files, key)
    for note in ratings.notes:
        progress.warn(note)
    judgement = report(ratings, seed)
    if as_json:
        facts: dict[str, Any] = judgement.to_dict()
        console.result_json(facts)
        return
    for title, columns, cells in judgement.tables():
        console.result_table(title, columns, cells)
