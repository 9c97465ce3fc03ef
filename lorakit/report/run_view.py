"""One run as a page shows it, from its folder alone. Without torch, and without the rows that it was trained on."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorakit.amounts import counted, decimal_bytes, duration, percent
from lorakit.errors import first_line
from lorakit.evaluate.diagnosis.finding import format_number
from lorakit.report.chart import Chart, Line, draw
from lorakit.report.curves import FEW, Curves, averaged, read_curves, smooth
from lorakit.report.samples import LearnedRow, learned_rows
from lorakit.report.scores import (
    AnsweredRow,
    ConfusionMatrix,
    ScorePart,
    answered_rows,
    confusion_matrices,
    score_parts,
)
from lorakit.run_dir import Run
from lorakit.share.diff_side import flatten
from lorakit.share.runs import RunSummary, short_base, summarize_run
from lorakit.share.scores import StoredScores, find_scores, value_at

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Fact:
    """A figure of the page's head: what it is, the figure, and a remark. `sign`: a verdict's colour."""

    name: str
    figure: str
    remark: str = ""
    sign: str = ""


@dataclass(frozen=True)
class Setting:
    """A key of the recipe with its value, and why lorakit chose it where the recipe left it open."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class LengthBin:
    """A bin of row lengths: its tokens, its rows, and its height in per cent of the highest."""

    tokens: str
    rows: int
    height: int


@dataclass(frozen=True)
class RowsView:
    """What became of one side's rows: facts and counts by reason, and the lengths of the rows."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sources: tuple[tuple[str, ...], ...]
    dropped: tuple[tuple[int, str, str], ...]
    findings: tuple[tuple[int, str, str], ...]
    tasks: tuple[tuple[str, int], ...]
    bars: tuple[LengthBin, ...]


@dataclass(frozen=True)
class FindingView:
    model: str
    name: str
    value: str
    threshold: str
    flagged: bool
    remedy: str


@dataclass(frozen=True)
class SampleView:
    """A training row in stretches of text, each with whether it is trained."""

    where: str
    stretches: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class RunView:
    """Everything that the page says about a run."""

    id: str
    name: str
    folder: str
    base: str
    date: str
    state: str
    reason: str
    facts: tuple[Fact, ...]
    charts: tuple[Chart, ...]
    held_out_losses: tuple[tuple[int, str], ...]
    memory_ran_out: tuple[int, ...]
    learned: tuple[LearnedRow, ...]
    rows: tuple[RowsView, ...]
    samples: tuple[SampleView, ...]
    scored: str
    models: tuple[str, ...]
    parts: tuple[ScorePart, ...]
    costs: tuple[tuple[str, ...], ...]
    prompting: tuple[str, ...]
    findings: tuple[FindingView, ...]
    matrices: tuple[ConfusionMatrix, ...]
    answers: tuple[AnsweredRow, ...]
    answered: int
    unanswered: str
    settings: tuple[Setting, ...]
    versions: tuple[tuple[str, str], ...]
    command: str
    damaged: tuple[str, ...]

    @property
    def has_marks(self) -> bool:
        """Whether answers are told apart as better and worse."""
        return any(row.mark for row in self.answers)


@dataclass(frozen=True)
class RunFiles:
    """What was read of a run."""

    run: Run
    manifest: dict[str, Any]
    summary: RunSummary
    curves: Curves
    scores: StoredScores | None


def read_run(folder: Path) -> RunFiles:
    """The files of a run; UserError where it is not one."""
    run = Run(folder)
    manifest = run.read_manifest()
    scores, _ = find_scores(run, manifest)
    return RunFiles(run, manifest, summarize_run(run), read_curves(run), scores)


def view_run(files: RunFiles, identifier: str, most_rows: int) -> RunView:
    """One run as a page shows it, with at most so many rows' answers."""
    run, manifest, summary, curves, scores = files.run, files.manifest, files.summary, files.curves, files.scores
    damaged = list(summary.notes)

    def part(name: str, made: Callable[[], Iterable[_Item]]) -> tuple[_Item, ...]:
        """A part of the page, or nothing where its file holds what lorakit does not write there: the page says so."""
        try:
            return tuple(made())
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            damaged.append(f"{name} ({first_line(error)})")
            return ()

    def scored(name: str, made: Callable[[StoredScores], Iterable[_Item]]) -> tuple[_Item, ...]:
        return part(f"{name}, in {scores.path.name}", lambda: made(scores)) if scores else ()

    rows, answered, unanswered = next(iter(scored("answers", lambda of: [answered_rows(of, most_rows)])), ((), 0, ""))
    return RunView(
        identifier,
        summary.recipe or run.folder.resolve().name,
        run.folder.resolve().name,
        short_base(summary),
        summary.date[:16].replace("T", " "),
        summary.state,
        summary.reason or "",
        part("figures", lambda: _facts(files)),
        part("curves", lambda: _charts(files)),
        tuple((int(step), f"{value:.4f}") for step, value in curves.held_out),
        curves.memory_ran_out,
        part("samples, in log.jsonl", lambda: learned_rows(run)),
        part("data, in manifest.json", lambda: _rows_views(manifest)),
        part("samples.jsonl", lambda: _samples(run)),
        f"{scores.date[:16].replace('T', ' ')} UTC, {_rows_scored(scores)}" if scores else "",
        tuple(scores.document["models"]) if scores else (),
        scored("scores", score_parts),
        scored("costs", _costs),
        scored("prompting", _prompting),
        scored("findings", _findings),
        scored("confusion matrices", confusion_matrices),
        rows,
        answered,
        unanswered,
        part("recipe, in manifest.json", lambda: _settings(manifest)),
        tuple((str(name), str(version)) for name, version in _mapping(manifest.get("versions")).items()),
        f"lorakit eval {run.folder}",
        tuple(damaged),
    )


def _rows_scored(scores: StoredScores) -> str:
    facts = _mapping(scores.document.get("rows"))
    count, source = facts.get("count"), facts.get("source")
    return f"{counted(count, 'row') if isinstance(count, int) else 'rows'} of {source}"


def _facts(files: RunFiles) -> list[Fact]:
    summary, result = files.summary, _mapping(files.manifest.get("result"))
    facts = [fact for fact in (_main_fact(files.scores), _loss_fact(files)) if fact]
    done, planned = summary.steps_done, summary.steps_planned
    steps = f"{done or 0:,}" if done == planned or not planned else f"{done or 0:,} of {planned:,}"
    seconds, speed = summary.seconds, result.get("trained_tokens_per_second")
    remark = f"{speed:,.0f} trained tokens/s" if isinstance(speed, int | float) and speed else ""
    facts.append(Fact("steps", steps, f"in {duration(seconds)}" if seconds else summary.state))
    if remark:
        facts.append(Fact("speed", f"{speed:,.0f}", "trained tokens/s"))
    trained = _mapping(files.manifest.get("parameters"))
    if isinstance(trained.get("trainable"), int) and isinstance(trained.get("total"), int):
        share = percent(trained["trainable"] / max(trained["total"], 1), 2)
        facts.append(Fact("trained parameters", f"{trained['trainable']:,}", f"{share} of {trained['total']:,}"))
    peak, expected = result.get("peak_memory"), value_at(files.manifest, "predicted_memory", "total")
    if isinstance(peak, int) and peak:
        predicted = f"predicted: {decimal_bytes(expected)}" if isinstance(expected, int | float) else ""
        facts.append(Fact("peak memory", decimal_bytes(peak), predicted))
    return facts


def _main_fact(scores: StoredScores | None) -> Fact | None:
    """The main score of what was trained beside the baseline's."""
    name = scores.main_score if scores else None
    if scores is None or name is None:
        return None
    part = next((part for part in score_parts(scores) if not part.title), None)
    line = next((line for line in part.lines if line.name == name), None) if part else None
    if line is None:
        return None
    texts = {place.model: place.text for place in line.places if place}
    baseline, verdict = str(scores.document.get("baseline")), scores.verdict(name)
    against = f"{baseline}: {texts[baseline]}" if baseline in texts and baseline != scores.model else ""
    return Fact(name, texts.get(scores.model, "-"), f"{against} · {verdict}" if verdict else against, verdict or "")


def _loss_fact(files: RunFiles) -> Fact | None:
    summary = files.summary
    if summary.best_loss is None:
        return None
    first = files.curves.held_out[0]
    remark = f"best, at step {summary.best_step:,}"
    if len(files.curves.held_out) > 1:
        remark += f"; {first[1]:.4f} at step {first[0]:,.0f}"
    return Fact("held-out loss", f"{summary.best_loss:.4f}", remark)


def _charts(files: RunFiles) -> list[Chart]:
    curves, summary = files.curves, files.summary
    is_long = len(curves.loss) > FEW
    losses = [
        Line("training loss", curves.loss, "raw" if is_long else "smooth"),
        Line("training loss, averaged", smooth(curves.loss) if is_long else ()),
        Line("held-out loss", curves.held_out, "marked", 1),
    ]
    best = None
    if summary.best_loss is not None and summary.best_step is not None and len(curves.held_out) > 1:
        best = (float(summary.best_step), summary.best_loss)
    charts = [draw("loss a trained token", losses, best)]
    for title, points in (
        ("learning rate", curves.learning_rate),
        ("norm of the gradient", curves.grad_norm),
        ("trained tokens/s", curves.speed),
    ):
        kind = "raw" if is_long and title != "learning rate" else "smooth"
        averaged = [Line("averaged", smooth(points))] if kind == "raw" else []
        charts.append(draw(title, [Line(title, points, kind), *averaged], may_be_log=title == "norm of the gradient"))
    return [chart for chart in charts if chart]


def compare_curves(all_files: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """The losses of several runs, held-out and training, in one chart each."""
    colours = range(len(names))
    held_out = [
        Line(name, files.curves.held_out, "marked", colour)
        for name, files, colour in zip(names, all_files, colours, strict=True)
    ]
    training = [
        Line(name, averaged(files.curves.loss), "smooth", colour)
        for name, files, colour in zip(names, all_files, colours, strict=True)
    ]
    charts = [draw("held-out loss a token", held_out), draw("training loss a token", training)]
    return [chart for chart in charts if chart]


def _rows_views(manifest: Mapping[str, Any]) -> list[RowsView]:
    views = []
    for side, title in (("train", "training rows"), ("eval", "held-out rows")):
        report = _mapping(value_at(manifest, "data", side))
        if not report:
            continue
        counts = {name: report.get(name, 0) for name in ("read", "kept", "tokens", "trained_tokens", "longest", "cut")}
        facts = [
            ("read", f"{counts['read']:,}"),
            ("used", f"{counts['kept']:,}"),
            ("tokens", f"{counts['tokens']:,}"),
            ("trained tokens", f"{counts['trained_tokens']:,} ({_share(counts['trained_tokens'], counts['tokens'])})"),
            ("longest row", f"{counts['longest']:,} tokens"),
            ("cut at max_length", f"{counts['cut']:,}"),
            ("answers end with", ", ".join(map(str, report.get("stop_tokens") or [])) or "-"),
        ]
        views.append(
            RowsView(
                title,
                tuple(facts),
                tuple(_source_cells(source) for source in report.get("sources") or [] if isinstance(source, dict)),
                _reasons(report.get("dropped")),
                _reasons(report.get("found")),
                tuple((str(name), int(count)) for name, count in _mapping(report.get("tasks")).items()),
                _bars(value_at(manifest, "data", "lengths", side)),
            )
        )
    return views


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "-"


def _source_cells(source: Mapping[str, Any]) -> tuple[str, ...]:
    counts = [f"{source[key]:,}" if isinstance(source.get(key), int) else "-" for key in ("kept", "trained_tokens")]
    return str(source.get("path")), str(source.get("format")), str(source.get("task") or "-"), *counts


def _reasons(facts: Any) -> tuple[tuple[int, str, str], ...]:
    counts, first = _mapping(value_at(facts, "counts")), _mapping(value_at(facts, "first"))
    ordered = sorted(counts.items(), key=lambda item: -int(item[1]))
    return tuple((int(count), str(reason), str((first.get(reason) or [""])[0])) for reason, count in ordered)


def _bars(bins: Any) -> tuple[LengthBin, ...]:
    if not isinstance(bins, list) or not bins:
        return ()
    highest = max(count for _, _, count in bins)
    return tuple(
        LengthBin(f"{low:,} to {high:,}", count, max(1, round(100 * count / highest)) if count else 0)
        for low, high, count in bins
    )


def _samples(run: Run) -> list[SampleView]:
    if not run.samples.is_file():
        return []
    samples = []
    for line in run.samples.read_text(encoding="utf-8", errors="replace").splitlines():
        facts = _parsed(line)
        stretches = facts.get("stretches")
        if isinstance(stretches, list):
            pairs = [(str(one[0]), bool(one[1])) for one in stretches if isinstance(one, list) and len(one) == 2]
            samples.append(SampleView(str(facts.get("where")), tuple(pairs)))
    return samples


def _parsed(line: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _costs(scores: StoredScores) -> list[tuple[str, ...]]:
    """Of each model that answered: the tokens that it read and wrote, and its seconds, on average."""
    rows = []
    for model, facts in scores.document["models"].items():
        costs = _mapping(facts.get("costs"))
        figures = [costs.get(key) for key in ("prompt_tokens", "answer_tokens", "seconds")]
        if isinstance(figures[0], int | float):
            rows.append((model, *(f"{one:,.1f}" if isinstance(one, int | float) else "-" for one in figures)))
    return rows


def _prompting(scores: StoredScores) -> list[str]:
    written = scores.document.get("prompting")
    return [str(one.get("in_words")) for one in written if isinstance(one, dict)] if isinstance(written, list) else []


def _findings(scores: StoredScores) -> list[FindingView]:
    views = []
    for model, findings in _mapping(scores.document.get("findings")).items():
        for one in findings if isinstance(findings, list) else ():
            value, threshold = one.get("value"), one.get("threshold")
            measured = format_number(value) if isinstance(value, int | float) else "not measured"
            limit = f"{threshold:g}" if isinstance(threshold, int | float) else "-"
            remedy = str(one.get("remedy") or "")
            views.append(FindingView(model, str(one.get("name")), measured, limit, bool(one.get("flagged")), remedy))
    return sorted(views, key=lambda one: not one.flagged)


def _settings(manifest: Mapping[str, Any]) -> list[Setting]:
    recorded = manifest.get("auto")
    choices = [one for one in recorded if isinstance(one, dict)] if isinstance(recorded, list) else []
    reasons = {str(one.get("path")): str(one.get("reason") or "") for one in choices}
    return [
        Setting(key, written(value), reasons.get(key, "")) for key, value in flatten(_mapping(manifest.get("recipe")))
    ]


def written(value: Any) -> str:
    """A value as a recipe may have it: `null`, `true`, `["a", "b"]`, and texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
