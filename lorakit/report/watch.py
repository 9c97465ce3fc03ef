"""A run as it trains, in lines for a terminal: how far it is, its losses, and what it takes."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorakit.amounts import duration
from lorakit.report.chart import Line, short
from lorakit.report.curves import averaged, read_curves
from lorakit.run_dir import Run
from lorakit.share.runs import RunSummary, short_base, short_data, summarize_run

_WIDEST, _MARGIN = 110, 14
_TALL, _LEAST_CHART = 34, 10  # lines from which a second chart fits, or one


@dataclass
class RunWatch:
    """What is seen of one run. `seen`: when which step was seen first, by which the time left is told."""

    run: Run
    seen: list[tuple[float, int]] = field(default_factory=list)

    def look(self) -> RunSummary:
        """The run as it is now; UserError where the folder is not a run."""
        self.run.read_manifest()
        summary = summarize_run(self.run)
        step = summary.steps_done or 0
        if not self.seen or self.seen[-1][1] != step:
            self.seen.append((time.monotonic(), step))
        return summary

    def seconds_left(self, summary: RunSummary) -> float | None:
        """The time that the steps left take at the speed of those that were seen; None before two were."""
        (begin, first), (end, last) = self.seen[0], self.seen[-1]
        if summary.state != "running" or last <= first or not summary.steps_planned:
            return None
        return (summary.steps_planned - last) * (end - begin) / (last - first)


@dataclass(frozen=True)
class Frame:
    """What a terminal shows of a run: lines of text, and charts with their colours as ANSI codes."""

    head: str
    charts: tuple[str, ...]


def frame(watch: RunWatch, summary: RunSummary, width: int, height: int) -> Frame:
    """What a terminal of so many columns and lines shows of a run."""
    curves, columns = read_curves(watch.run), min(width, _WIDEST)
    head = [f"{watch.run.folder}  {short_base(summary)}, {short_data(summary)}", _progress(watch, summary, columns)]
    figures = [
        ("loss", curves.loss),
        ("held-out loss", curves.held_out),
        ("learning rate", curves.learning_rate),
        ("gradient norm", curves.grad_norm),
        ("trained tokens/s", curves.speed),
    ]
    head.append("  ".join(f"{name} {short(points[-1][1])}" for name, points in figures if points))
    if summary.best_loss is not None and summary.best_step is not None:
        head[-1] += f"  best {short(summary.best_loss)} at step {summary.best_step:,}"
    head[-1:] = textwrap.wrap(head[-1], width)
    if curves.memory_ran_out:
        head.append(f"memory ran out at step {', '.join(map(str, curves.memory_ran_out))}")
    if summary.reason:
        head.append(summary.reason)
    head += _newest_samples(watch.run, height - len(head) - 2 - _LEAST_CHART)
    room = height - len(head) - 2
    losses = [Line("loss", averaged(curves.loss)), Line("held-out loss", curves.held_out)]
    charts = []
    if curves.loss and room >= _LEAST_CHART:
        second = height >= _TALL and len(curves.grad_norm) > 1
        charts.append(terminal_chart("loss a trained token", losses, columns, room - (12 if second else 0)))
        if second:
            charts.append(terminal_chart("gradient norm", [Line("", averaged(curves.grad_norm))], columns, 12))
    return Frame("\n".join(line[:width] for line in head), tuple(charts))


def _newest_samples(run: Run, most: int) -> list[str]:
    """The newest answers to held-out rows (`evaluate.samples`), a line each, in at most so many lines."""
    line = next((one for one in run.read_log("samples") if isinstance(one.get("samples"), list)), None)
    samples = [one for one in line["samples"] if isinstance(one, dict)] if line else []
    if line is None or not samples or most < 2:
        return []
    answers = [f"  {one.get('row')}: {' '.join(str(one.get('answer')).split())}" for one in samples[: most - 1]]
    return [f"held-out rows answered after step {line.get('step')}:", *answers]


def _progress(watch: RunWatch, summary: RunSummary, columns: int) -> str:
    done, planned = summary.steps_done or 0, summary.steps_planned or 0
    left = watch.seconds_left(summary)
    text = f" {summary.state}, step {done:,} of {planned:,}" if planned else f" {summary.state}, step {done:,}"
    text += f", {duration(left)} left" if left is not None else ""
    cells = max(10, min(40, columns - len(text) - 2))
    full = round(cells * min(1.0, done / planned)) if planned else 0
    return "━" * full + "╌" * (cells - full) + text


def terminal_chart(title: str, lines: Sequence[Line], columns: int, rows: int) -> str:
    """Lines of values by step in braille characters, within so many columns and rows."""
    from uniplot import plot_to_string

    drawn = [line for line in lines if line.points]
    named = len(drawn) > 1
    text = plot_to_string(
        xs=[[step for step, _ in line.points] for line in drawn],
        ys=[[value for _, value in line.points] for line in drawn],
        lines=[len(line.points) > 1 for line in drawn],
        width=max(20, columns - _MARGIN),
        height=max(4, rows - (5 if named else 4)),
        character_set="braille",
        color=True,
        title=title,
        legend_labels=[line.name for line in drawn] if named else None,
    )
    return str(text).rstrip("\n")
