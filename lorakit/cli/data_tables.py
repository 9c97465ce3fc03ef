"""The tables that `lorakit data` prints, and how often the rows of each source are drawn."""

from dataclasses import dataclass

from lorakit import console
from lorakit.amounts import percent
from lorakit.data.batches import draws
from lorakit.data.dataset import Examples
from lorakit.data.report import Report, SourceReport
from lorakit.data.survey import Survey
from lorakit.recipe.schema import Data, Train

# Of each check: the most frequent reasons, and the first cases of each. `--json` has more.
_REASONS, _CASES = 5, 3
# The most epochs whose draws are listed one by one.
_EPOCHS = 8


@dataclass(frozen=True)
class SourceDraws:
    """How many of the `rows` examples of one source each epoch of the run draws."""

    source: SourceReport
    rows: int
    epochs: list[int]

    def __str__(self) -> str:
        each = ", ".join(f"{number:,}" for number in self.epochs)
        if len(self.epochs) > _EPOCHS:
            each = f"{min(self.epochs):,} to {max(self.epochs):,}"
        epochs = "the one epoch" if len(self.epochs) == 1 else f"{len(self.epochs)} epochs"
        return (
            f"{self.source.path}: weight {self.source.weight:g}: of {self.rows:,} rows {each} drawn in {epochs} of the "
            f"run, {sum(self.epochs):,} in total"
        )

    @property
    def warning(self) -> str | None:
        """The warning about a source of which no row is trained."""
        if any(self.epochs):
            return None
        if not self.rows:
            return f"{self.source.path}: no row is trained: no rows are left"
        return (
            f"{self.source.path}: no row is trained: weight {self.source.weight:g} draws none of its {self.rows:,} "
            "rows in this run. Raise its weight, or train longer"
        )


def count_draws(train: Examples, settings: Train) -> list[SourceDraws]:
    """What a run draws of each source."""
    mixture = train.mixture
    steps = mixture.run_steps(settings.batch_size, settings.epochs, settings.steps)
    epochs = draws(train.lengths().tolist(), settings.batch_size, settings.seed, mixture, steps)
    return [
        SourceDraws(source, rows, [epoch[number] for epoch in epochs])
        for number, (source, rows) in enumerate(zip(train.report.sources, mixture.counts, strict=True))
    ]


def print_survey(survey: Survey, settings: Data, batch_size: int, drawn: list[SourceDraws]) -> None:
    """Print everything but the sample rows."""
    for name, report in survey.reports.items():
        _print_sources(name, report)
    for one in drawn:
        if one.source.weight != 1:
            console.result(str(one))
    for name, report in survey.reports.items():
        _print_left_out(name, report, settings)
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
            console.result(f"{check}: {count:,} x {reason}")
            _print_cases(findings.first[reason][:_CASES])


def _print_sources(name: str, report: Report) -> None:
    columns = ["source", "rows", "examples", "tokens", "trained"]
    tagged = any(source.task for source in report.sources)
    weighted = any(source.weight != 1 for source in report.sources)
    columns += ["task"] * tagged + ["weight"] * weighted
    rows = [
        [
            source.path,
            f"{source.used:,}",
            f"{source.examples:,}",
            f"{source.tokens:,}",
            percent(source.trained_tokens / source.tokens, 1) if source.tokens else "-",
            *([source.task or "-"] if tagged else []),
            *([f"{source.weight:g}"] if weighted else []),
        ]
        for source in report.sources
    ]
    console.result_table(f"{name}: {report.used:,} of {report.read:,} rows", columns, rows)
    for source in report.sources:
        console.result(f"{source.path}: format {source.format}: {source.why}")


def _print_left_out(name: str, report: Report, settings: Data) -> None:
    for reason, count in report.dropped.counts.items():
        console.result(f"{name}: {count:,} rows dropped: {reason}")
        _print_cases(report.dropped.first[reason])
    if report.cut:
        console.result(f"{name}: {report.cut:,} rows cut to data.max_length, {settings.max_length:,} tokens")
    if report.passed_over:
        console.result(f"{name}: {report.passed_over:,} rows passed over by take")
    for note, count in report.notes.items():
        console.result(f"{name}: {count:,} rows: {note}")
    if report.several:
        console.result(
            f"{name}: {report.several:,} rows became several examples, {report.examples:,} in all: texts that were "
            "split, or conversations whose template writes an answer otherwise once others follow"
        )


def _print_cases(cases: list[str]) -> None:
    for case in cases:
        console.result(f"    {case}")


def _print_lengths(survey: Survey, settings: Data) -> None:
    texts = sum(count for _, _, count in survey.bins)
    bars = [(f"{first:,} - {last:,}", count) for first, last, count in survey.bins]
    console.result("")
    console.result_bars(f"tokens a text, {texts:,} texts before data.max_length", bars)
    console.result(", ".join(f"{name} {value:,}" for name, value in survey.lengths.items()))
    rows = [
        [
            f"{limit.max_length:,}" + (" (now)" if limit.max_length == settings.max_length else ""),
            f"{limit.over:,}",
            percent(limit.trained_with_drop, 1),
            percent(limit.trained_with_truncate, 1),
            percent(limit.time_with_drop),
            percent(limit.time_with_truncate),
        ]
        for limit in survey.limits
    ]
    columns = ["data.max_length", "longer", "trained: drop", "truncate", "time: drop", "truncate"]
    console.result("")
    console.result_table("what another max_length would keep and cost", columns, rows)
