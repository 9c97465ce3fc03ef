"""The page: one file that holds all it shows, and loads nothing."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorakit.amounts import format_difference
from lorakit.atomic_io import write_atomic
from lorakit.errors import LorakitError, UserError
from lorakit.report.chart import Chart
from lorakit.report.run_view import RunFiles, RunView, compare_curves, read_run, view_run, written
from lorakit.report.sweep_view import SweepView, is_sweep, read_sweep
from lorakit.run_dir import now
from lorakit.share.diff_side import flatten
from lorakit.share.runs import RunSummary, short_score
from lorakit.share.score_diff import compare_scores

MARK = '<meta name="generator" content="lorakit report">'
"""By which a file is known to be a report, which another one may replace."""
_PLACES = ("output.dir", "name")  # where a run lies, and not what it is


@dataclass(frozen=True)
class ComparedScore:
    """A score of several runs: each one's value, and the verdict against the first."""

    name: str
    values: tuple[str, ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """What several runs have in common and in what they differ."""

    names: tuple[str, ...]
    summaries: tuple[RunSummary, ...]
    metrics: tuple[str, ...]
    charts: tuple[Chart, ...]
    keys: tuple[tuple[str, tuple[str, ...]], ...]
    scores: tuple[ComparedScore, ...]
    unpaired: tuple[str, ...]


def write_report(folders: Sequence[Path], output: Path, most_rows: int) -> dict[str, Any]:
    """Write the page about some runs and sweeps to a file, which is absent or an older page; what it holds, in figures.
    UserError where a folder is neither, or the file is something else."""
    _refuse_other_file(output)
    given = [(folder, read_sweep(folder) if is_sweep(folder) else None) for folder in folders]
    sweeps = tuple(one[0] for _, one in given if one)
    folders = [path for folder, one in given for path in (one[1] if one else [folder])]
    all_files = [read_run(folder) for folder in folders]
    each = most_rows // max(len(folders), 1)
    views = [view_run(one, f"run-{number}", each) for number, one in enumerate(all_files, start=1)]
    page = render(views, _overview(all_files) if len(all_files) > 1 else None, sweeps)
    try:
        write_atomic(output, page)
    except OSError as error:
        raise LorakitError(f"{output}: cannot be written: {error.strerror or error}.") from error
    runs = [
        {"folder": str(one.run.folder), "state": one.summary.state, "answers": len(view.answers)}
        for one, view in zip(all_files, views, strict=True)
    ]
    return {"report": str(output), "bytes": len(page.encode()), "runs": runs}


def _refuse_other_file(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"{output}: is a folder. Give the file to write, such as {output / 'report.html'}.")
    if output.exists():
        if not output.is_file():
            raise UserError(f"{output}: is not a regular file. Choose another with --output.")
        with output.open("rb") as file:
            beginning = file.read(4096)
        if MARK.encode() not in beginning:
            raise UserError(f"{output}: lorakit report did not write it, and does not replace it. Choose another.")


def render(views: Sequence[RunView], overview: Overview | None, sweeps: Sequence[SweepView] = ()) -> str:
    """The page as HTML. Every text is escaped by the template engine; its policy lets it run and load nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    parts = files("lorakit.report") / "page"
    style, script = ((parts / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    policy = f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'"
    environment = Environment(
        loader=PackageLoader("lorakit.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        mark=Markup(MARK),
        style=Markup(style),
        script=Markup(script),
        title=sweeps[0].name if sweeps else views[0].name if len(views) == 1 else f"{len(views)} runs",
        sweeps=sweeps,
        runs=views,
        overview=overview,
        written=now()[:16].replace("T", " "),
    )


def _overview(all_files: Sequence[RunFiles]) -> Overview:
    names = _unique_names([one.run.folder for one in all_files])
    scores, unpaired = _compare_scores(all_files, names)
    return Overview(
        names,
        tuple(one.summary for one in all_files),
        tuple(short_score(one.summary) for one in all_files),
        tuple(compare_curves(all_files, names)),
        tuple(_differing_keys(all_files)),
        scores,
        unpaired,
    )


def _unique_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The last parts of the paths, as few as tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{path.name} ({number})" for number, path in enumerate(resolved, start=1))


def _differing_keys(all_files: Sequence[RunFiles]) -> list[tuple[str, tuple[str, ...]]]:
    flat = [dict(flatten(one.manifest.get("recipe") or {})) for one in all_files]
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        values = tuple(written(one[key]) if key in one else "-" for one in flat)
        if key not in _PLACES and len(set(values)) > 1:
            rows.append((key, values))
    return rows


def _compare_scores(
    all_files: Sequence[RunFiles], names: Sequence[str]
) -> tuple[tuple[ComparedScore, ...], tuple[str, ...]]:
    """The scores of all runs, each with its verdict against the first run where both were scored on the same rows."""
    stored = [one.scores for one in all_files]
    first = stored[0]
    differences = [compare_scores(first, one) if first and one else None for one in stored[1:]]
    unscored = [name for name, one in zip(names, stored, strict=True) if not one]
    unpaired = [f"{', '.join(unscored)}: not scored"] if unscored else []
    unpaired += [
        f"{name}: {one.unpaired['']}"
        for name, one in zip(names[1:], differences, strict=True)
        if one and "" in one.unpaired
    ]
    lines = []
    for score in dict.fromkeys(name for one in stored if one for name in one.scores):
        of_runs = [one.scores.get(score) if one else None for one in stored]
        unit = next((str(one.get("unit")) for one in of_runs if one), "")
        values = tuple("-" if one is None else _score_text(one["value"], unit) for one in of_runs)
        verdicts = [""]
        for one in differences:
            compared = one.comparisons.get(score) if one else None
            text = f"{format_difference(compared.difference, unit)}, {compared.verdict}" if compared else ""
            verdicts.append(text)
        lines.append(ComparedScore(score, values, tuple(verdicts)))
    return tuple(lines), tuple(unpaired)


def _score_text(value: float, unit: str) -> str:
    from lorakit.amounts import format_score

    return format_score(value, unit)
