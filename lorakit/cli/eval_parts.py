"""The other things that `lorakit eval` does with models: benchmarks, and sheets for people to rate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.evaluate.benchmarks import Benchmark
    from lorakit.evaluate.models import ModelSet
    from lorakit.evaluate.results import EvalSettings
    from lorakit.progress import Progress

NOT_KEPT = "not kept: no run is among these, and --output DIR says where scores and answers go"


def folder_of(model_set: "ModelSet", output: Path | None) -> Path | None:
    """Where scores are kept: the folder named, else that of the first run; None where there is neither.

    Raises:
        UserError: it is a file, or nothing can be written there.
    """
    from lorakit.evaluate.report_files import check_writable

    folder = output or (model_set.run.evaluations if model_set.run else None)
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder}: is a file. Give a folder.")
    if folder:
        check_writable(folder)
    return folder


def benchmark_of(
    tasks: str, path: Path | None, limit: int | None, chat: bool, allow_code: bool, seed: int
) -> "Benchmark":
    """What the options of benchmarks ask for.

    Raises:
        UserError: no task is named.
    """
    from lorakit.evaluate.benchmarks import Benchmark

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UserError("--tasks: no task is named. Write names with commas, such as --tasks gsm8k,arc_easy.")
    return Benchmark(names, path, limit, chat, allow_code, seed)


def report_benchmark(
    model_set: "ModelSet",
    benchmark: "Benchmark",
    baseline: str | None,
    output: Path | None,
    as_json: bool,
    progress: "Progress",
) -> None:
    """Run tasks on every subject; print and keep their figures.

    Raises:
        UserError, LorakitError: as `run_benchmark`, or the file cannot be written.
    """
    from lorakit import console
    from lorakit.evaluate.benchmarks import benchmark_document, benchmark_tables, run_benchmark
    from lorakit.evaluate.report_files import write_document
    from lorakit.evaluate.run import find_baseline

    folder = folder_of(model_set, output)
    name = model_set.specs[find_baseline(model_set, baseline)].name
    done = run_benchmark(model_set, benchmark, name, progress)
    document = benchmark_document(done)
    path = write_document(document, folder, "tasks-") if folder else None
    if as_json:
        console.result_json({**document, "file": str(path) if path else None})
        return
    for table in benchmark_tables(done):
        console.result_table(*table)
    console.result(f"all figures: {path}" if path else NOT_KEPT)


def write_questions_sheet(
    model_set: "ModelSet",
    settings: "EvalSettings",
    folder: Path,
    file: Path,
    overwrite: bool,
    as_json: bool,
    progress: "Progress",
) -> None:
    """Ask every subject the questions of a file, and write a page on which people rate the answers.

    Raises:
        UserError: the questions cannot be read, there is one model alone, or the folder has another sheet.
    """
    from lorakit import console
    from lorakit.evaluate.questioning import answers_to_questions
    from lorakit.evaluate.questions import read_questions
    from lorakit.evaluate.sheet import write_sheet

    questions = read_questions(file)
    if len(model_set.specs) < 2:
        raise UserError(f"--sheet: compares the answers of several models, and {model_set.specs[0].given} is one.")
    answers = answers_to_questions(model_set, questions, settings, progress)
    name = str(model_set.prepared.recipe.name) if model_set.prepared else folder.name
    sheet = write_sheet(folder, name, questions, answers, settings.seed, overwrite)
    if as_json:
        console.result_json(sheet.to_dict())
        return
    console.result(
        f"for raters: {sheet.page} ({sheet.questions} questions, {sheet.answers} answers)\n"
        f"keep to yourself: {sheet.key}\n"
        f"then: lorakit eval --ratings ratings-*.json --key {sheet.key}"
    )


def report_ratings(files: list[Path], key: Path, seed: int, as_json: bool, progress: "Progress") -> None:
    """Print what raters exported from a sheet's page.

    Raises:
        UserError: the files are not of this sheet.
    """
    from lorakit import console
    from lorakit.evaluate.judgement import report
    from lorakit.evaluate.ratings import read_ratings

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
