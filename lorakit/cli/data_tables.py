"""The tables that `lorakit data` prints."""

from lorakit import console
from lorakit.amounts import percent
from lorakit.cli.draws import SourceDraws
from lorakit.data.report import Report
from lorakit.data.survey import Survey
from lorakit.recipe.schema import Data

# Of each check: the most frequent reasons, and the first cases of each. `--json` has more.
_REASONS, _CASES = 5, 3


def print_survey(found: Survey, settings: Data, batch_size: int, drawn: list[SourceDraws]) -> None:
    """Print everything but the sample rows. `drawn`: what a run draws of each source."""
    for name, report in found.reports.items():
        _sources(name, report)
    for one in drawn:
        if one.source.weight != 1:
            console.result(str(one))
    for name, report in found.reports.items():
        _left_out(name, report, settings)
    _lengths(found)
    _limits(found, settings)
    _padding(found, batch_size)
    _checks(found)


def _sources(name: str, report: Report) -> None:
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
            _share(source.trained_tokens, source.tokens),
            *([source.task or "-"] if tagged else []),
            *([f"{source.weight:g}"] if weighted else []),
        ]
        for source in report.sources
    ]
    console.result_table(f"{name}: {report.used:,} of {report.read:,} rows", columns, rows)
    for source in report.sources:
        console.result(f"{source.path}: format {source.format}: {source.why}")


def _left_out(name: str, report: Report, settings: Data) -> None:
    for reason, count in report.dropped.counts.items():
        console.result(f"{name}: {count:,} rows dropped: {reason}")
        for case in report.dropped.first[reason]:
            console.result(f"    {case}")
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


def _lengths(found: Survey) -> None:
    texts = sum(count for _, _, count in found.bins)
    bars = [(f"{first:,} - {last:,}", count) for first, last, count in found.bins]
    console.result("")
    console.result_bars(f"tokens a text, {texts:,} texts before data.max_length", bars)
    console.result(", ".join(f"{name} {value:,}" for name, value in found.lengths.items()))


def _limits(found: Survey, settings: Data) -> None:
    rows = [
        [
            f"{limit.max_length:,}" + (" (now)" if limit.max_length == settings.max_length else ""),
            f"{limit.over:,}",
            percent(limit.trained_with_drop, 1),
            percent(limit.trained_with_truncate, 1),
            percent(limit.time_with_drop),
            percent(limit.time_with_truncate),
        ]
        for limit in found.limits
    ]
    columns = ["data.max_length", "longer", "trained: drop", "truncate", "time: drop", "truncate"]
    console.result("")
    console.result_table("what another max_length would keep and cost", columns, rows)


def _padding(found: Survey, batch_size: int) -> None:
    waste = found.padding
    console.result(
        f"padding in batches of {batch_size}: {percent(waste.in_file_order - 1)} in the order of the rows, "
        f"{percent(waste.by_length - 1)} by length, {percent(waste.packed - 1)} packed"
    )


def _checks(found: Survey) -> None:
    rows = [[check.name, check.action, f"{check.rows:,}"] for check in found.checks if check.action != "off"]
    console.result("")
    console.result_table("data.clean", ["check", "does", "found"], rows)
    for check in found.checks:
        for reason, count in sorted(check.counts.items(), key=lambda item: -item[1])[:_REASONS]:
            console.result(f"{check.name}: {count:,} x {reason}")
            for case in check.first[reason][:_CASES]:
                console.result(f"    {case}")


def _share(part: int, whole: int) -> str:
    return percent(part / whole, 1) if whole else "-"
