"""The tables that `lorakit data` prints, and how often the rows of each source are drawn."""

from dataclasses import dataclass

from lorakit import console
from lorakit.amounts import percent
from lorakit.data.batches import draws
from lorakit.data.dataset import Examples
from lorakit.data.figures import TO_RETRIEVAL
from lorakit.data.report import Report
from lorakit.data.survey import Survey
from lorakit.recipe.schema import Data, Train

# Of each check: the most frequent reasons, and the first cases of each. `--json` has more.
_REASONS, _CASES = 5, 3
_TASKS = 20  # that are counted by name
# The most epochs whose draws are listed one by one.
_EPOCHS = 8


@dataclass(frozen=True)
class SourceDraws:
    """How many examples of one source each epoch of a run draws; the rest is empty where there is nothing to say."""

    path: str
    epochs: list[int]
    figures: str
    warning: str


def count_draws(train: Examples, settings: Train) -> list[SourceDraws]:
    """What a run draws of each source."""
    mixture = train.mixture
    steps = mixture.run_steps(settings.batch_size, settings.epochs, settings.steps)
    epochs = draws(train.lengths().tolist(), settings.batch_size, settings.seed, mixture, steps)
    drawn = []
    for number, (source, rows) in enumerate(zip(train.report.sources, mixture.counts, strict=True)):
        counts, weight, figures, warning = [epoch[number] for epoch in epochs], f"weight {source.weight:g}", "", ""
        if source.weight != 1:
            each = ", ".join(f"{count:,}" for count in counts)
            each = f"{min(counts):,} to {max(counts):,}" if len(counts) > _EPOCHS else each
            span = "the one epoch" if len(counts) == 1 else f"{len(counts)} epochs"
            figures = f"{weight}: of {rows:,} rows {each} drawn in {span} of the run, {sum(counts):,} in total"
            figures = f"{source.path}: {figures}"
        if not any(counts):
            why = f"{weight} draws none of its {rows:,} rows in this run. Raise its weight, or train longer"
            warning = f"{source.path}: no row is trained: {why if rows else 'no rows are left'}"
        drawn.append(SourceDraws(source.path, counts, figures, warning))
    return drawn


def print_survey(survey: Survey, settings: Data, batch_size: int, drawn: list[SourceDraws]) -> None:
    """Print everything but the sample rows."""
    for name, report in survey.reports.items():
        _print_sources(name, report)
    for figures in filter(None, (one.figures for one in drawn)):
        console.result(figures)
    for name, report in survey.reports.items():
        for reason, count in report.dropped.counts.items():
            _print_cases(f"{name}: {count:,} rows dropped: {reason}", report.dropped.first[reason])
        for text in (*describe_cut(report, settings.max_length), *describe_rows(report)):
            console.result(f"{name}: {text}")
    _print_lengths(survey, settings)
    waste = survey.padding
    console.result(
        f"padding in batches of {batch_size}: {percent(waste.in_file_order - 1)} in the order of the rows, "
        f"{percent(waste.by_length - 1)} by length, {percent(waste.packed - 1)} packed"
    )
    active = {check: action for check, action in survey.actions.items() if action != "off"}
    rows = [[check, action, f"{survey.findings[check].total:,}"] for check, action in active.items()]
    console.result("")
    console.result_table("data.clean", ["check", "does", "found"], rows)
    for check, findings in survey.findings.items():
        for reason, count in sorted(findings.counts.items(), key=lambda item: -item[1])[:_REASONS]:
            _print_cases(f"{check}: {count:,} x {reason}", findings.first[reason][:_CASES])
    if survey.figures and survey.figures.is_low:
        console.result_wrapped(f"held-out: {survey.figures}. {TO_RETRIEVAL}", under="  ")


def _print_sources(name: str, report: Report) -> None:
    columns = ["source", "rows", "examples", "tokens", "trained", "task", "weight"]
    rows = []
    for source in report.sources:
        counts = [f"{number:,}" for number in (source.used, source.examples, source.tokens)]
        trained = percent(source.trained_tokens / source.tokens, 1) if source.tokens else "-"
        rows.append([source.path, *counts, trained, source.task or "-", f"{source.weight:g}"])
    console.result_table(f"{name}: {report.used:,} of {report.read:,} rows", columns, rows)
    if report.tasks:
        of_tasks = sorted(report.tasks.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{task} {count:,}" for task, count in of_tasks[:_TASKS])
        more = f", and {len(of_tasks) - _TASKS:,} other tasks" if len(of_tasks) > _TASKS else ""
        without = report.used - sum(report.tasks.values())
        console.result(f"{name}: rows by task: {shown}{more}" + (f"; without {without:,}" if without else ""))
    for source in report.sources:
        console.result(f"{source.path}: format {source.format}: {source.why}")


def describe_rows(report: Report) -> list[str]:
    """How the rows that are used became examples, and how many are passed over."""
    texts = [f"{count:,} rows: {note}" for note, count in report.notes.items()]
    if report.passed_over:
        texts.append(f"{report.passed_over:,} rows passed over by take")
    if report.several:
        texts.append(
            f"{report.several:,} rows became several examples, {report.examples:,} in all: texts that were split, or "
            "conversations whose template writes an answer otherwise once others follow"
        )
    return texts


def describe_cut(report: Report, max_length: int) -> list[str]:
    """How many rows are trained in part."""
    return [f"{report.cut:,} rows cut to data.max_length, {max_length:,} tokens"] if report.cut else []


def _print_cases(text: str, cases: list[str]) -> None:
    console.result("\n".join([text, *(f"    {case}" for case in cases)]))


def _print_lengths(survey: Survey, settings: Data) -> None:
    texts = sum(count for _, _, count in survey.bins)
    bars = [(f"{first:,} - {last:,}", count) for first, last, count in survey.bins]
    console.result("")
    console.result_bars(f"tokens a text, {texts:,} texts before data.max_length", bars)
    console.result(", ".join(f"{name} {value:,}" for name, value in survey.lengths.items()))
    rows = []
    for limit in survey.limits:
        shown = f"{limit.max_length:,}" + (" (now)" if limit.max_length == settings.max_length else "")
        shares = [percent(share, 1) for share in (limit.trained_with_drop, limit.trained_with_truncate)]
        times = [percent(share) for share in (limit.time_with_drop, limit.time_with_truncate)]
        rows.append([shown, f"{limit.over:,}", *shares, *times])
    columns = ["data.max_length", "longer", "trained: drop", "truncate", "time: drop", "truncate"]
    console.result("")
    console.result_table("what another max_length would keep and cost", columns, rows)
