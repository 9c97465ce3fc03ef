"""Examples: the rows of a recipe's sources, rendered, encoded, found, split, counted, and cached by content."""

from pathlib import Path

import numpy as np

from lorakit.data.cache import cached, key_of
from lorakit.data.cache import tokenizer_sha256 as tokenizer_sha256
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import SIDES, Examples, read_side, write_side
from lorakit.data.filter_and_split import RowSelection, select_rows
from lorakit.data.leaks import remove_leaks
from lorakit.data.pipeline import PipelineResult, run_pipeline, source_reports
from lorakit.data.report import Report
from lorakit.data.sources import all_sources, source_hashes, source_name, sources_of
from lorakit.data.worker import Rules
from lorakit.errors import UserError
from lorakit.progress import Progress, report_hub_retries
from lorakit.recipe.schema import Data, Source

# The checks that look at one row alone; the others compare rows.
ROW_CHECKS = ("encoding", "html", "noise", "trivial", "special_tokens")
# What changes how a row is read is told by every command, though it only reports.
_ALWAYS = ("special_tokens",)


def examples_of(
    settings: Data, template: ChatTemplate, progress: Progress, survey: bool = False
) -> tuple[Examples, Examples | None]:
    """The examples that a recipe trains on, and those that it never trains on (None when it names none).

    They come from the cache when nothing that matters has changed. `survey`: the checks that only report are made too,
    and what they need is kept in the examples' `traits`.

    Raises:
        UserError: a source cannot be read, a row is broken or overlong and the recipe says to stop, a check of
            `data.clean` says to stop, or nothing is left.
        LorakitError: the cache cannot be written.
    """
    share = settings.eval if isinstance(settings.eval, float) else None
    rules = rules_of(settings, share, survey)
    with report_hub_retries(progress):
        train, held_out = _prepared(sources_of(settings, settings.train), settings, rules, template, progress)
        if settings.eval is not None and share is None:
            held_out, _ = _prepared(sources_of(settings, settings.eval), settings, rules, template, progress)
            train = remove_leaks(train, held_out, settings.clean)
    return train, held_out


def held_out_of(settings: Data, template: ChatTemplate, progress: Progress) -> Examples | None:
    """The second of `examples_of` without reading the rows that are trained on, where they lie apart.

    Raises:
        UserError, LorakitError: as `examples_of`.
    """
    if settings.eval is None or isinstance(settings.eval, float):
        return examples_of(settings, template, progress)[1]
    rules = rules_of(settings, None, False)
    return _prepared(sources_of(settings, settings.eval), settings, rules, template, progress)[0]


def rules_of(settings: Data, share: float | None, survey: bool) -> Rules:
    """What holds for every row, and how much has to be known of each."""
    asked = ("fix", "error", "report") if survey else ("fix", "error")
    actions = {check: getattr(settings.clean, check) for check in type(settings.clean).model_fields}
    wanted = {
        check: action for check, action in actions.items() if action in asked or (check in _ALWAYS and action != "off")
    }
    compared = settings.eval is not None and share is None  # with other files, which are prepared by themselves
    leaks = compared and actions["leakage"] != "off"
    apart = share is not None and actions["near_leakage"] != "off"  # near-duplicates stay on one side of the split
    near = apart or "near_duplicates" in wanted or (compared and "near_leakage" in wanted)
    return Rules(
        max_length=settings.max_length,
        overlong=settings.overlong,
        broken=settings.broken,
        share=share,
        checks={check: wanted[check] for check in ROW_CHECKS if check in wanted},
        traits=leaks or bool(wanted.keys() & {"duplicates", "contradictions", "style"}),
        near=near,
        style="style" in wanted,
        apart=apart,
    )


def file_sha256s(settings: Data, held_out_only: bool = False) -> dict[str, str]:
    """The sha256 of every data file that the recipe names, by path; a hub dataset's fingerprint by its id and split."""
    sources = sources_of(settings, settings.eval) if held_out_only else all_sources(settings)
    return {name: content for source in sources for name, content in source_hashes(source).items()}


def _prepared(
    sources: list[Source], settings: Data, rules: Rules, template: ChatTemplate, progress: Progress
) -> tuple[Examples, Examples | None]:
    key = key_of(sources, rules, settings.clean, template)

    def build(folder: Path) -> None:
        _build(sources, settings, rules, template, progress, folder)

    def load(folder: Path) -> tuple[Examples, Examples | None]:
        held_out = None if rules.share is None else read_side(folder, SIDES[1], key)
        return read_side(folder, SIDES[0], key), held_out

    return cached(key, build, load, progress)


def _build(
    sources: list[Source],
    settings: Data,
    rules: Rules,
    template: ChatTemplate,
    progress: Progress,
    folder: Path,
) -> None:
    everything = folder / "all.arrow"
    gathered = run_pipeline(sources, template, rules, everything, progress)
    decided = select_rows(gathered, settings.clean, rules, [source.take for source in sources])
    for side, name in enumerate(SIDES[: 1 if rules.share is None else 2]):
        rows = decided.used & (decided.held_out == bool(side))
        report = _report(gathered, decided, rows, side)
        if not rows.any():
            raise UserError(_nothing_left(sources, report, rules, side))
        write_side(folder, name, gathered, rows, report)
    np.savez(folder / "shapes.npz", **vars(gathered.shapes))
    everything.unlink()


def _report(gathered: PipelineResult, decided: RowSelection, rows: np.ndarray, side: int) -> Report:
    """The report of one side. `rows`: a mask of those that are kept on it."""
    report, examples = gathered.reports[side], rows[gathered.owner]
    report.dropped.merge(decided.dropped[side])
    report.passed_over += int(decided.passed_over[side])
    report.findings.merge(decided.found[side])
    report.sources = source_reports(gathered.opened)
    report.used, report.cut = int(rows.sum()), int((gathered.cut & rows).sum())
    report.read = report.used + report.dropped.total + report.passed_over
    report.several = int((np.bincount(gathered.owner[examples], minlength=1) > 1).sum())
    report.notes = {note: int(rows[numbers].sum()) for note, numbers in gathered.notes.items() if rows[numbers].any()}
    source_of = gathered.source[gathered.owner]
    for number, source in enumerate(report.sources):
        its = examples & (source_of == number)
        source.used = int((rows & (gathered.source == number)).sum())
        source.examples, source.tokens = int(its.sum()), int(gathered.length[its].sum())
        source.trained_tokens = int(gathered.trained[its].sum())
    report.stop_tokens = [stop for stop, _ in gathered.stops.most_common()]
    report.add_up(int(gathered.length[examples].max(initial=0)))
    return report


def _nothing_left(sources: list[Source], report: Report, rules: Rules, side: int) -> str:
    names = ", ".join(map(source_name, sources))
    if report.dropped.total and report.read == report.dropped.total:
        longer = any(reason.startswith("longer than") for reason in report.dropped.counts)
        remedy = " Raise data.max_length, or write data.overlong: truncate." if longer else ""
        return f"{names}: no rows left ({report.read:,} read): {report.dropped}.{remedy}"
    if rules.share is None and report.passed_over:
        return f"{names}: take leaves none of {report.read:,} rows. Write a larger share, or a number of rows."
    if rules.share is None:
        return f"{names}: no rows left ({report.read:,} read)."
    left = "is held out" if side else "is left to train on"
    alike = " or write data.clean.near_leakage: off where rows are alike on purpose," if rules.apart else ""
    return f"{names}: with data.eval: {rules.share:g} no row {left}. Give more rows,{alike} or a file of held-out rows."
