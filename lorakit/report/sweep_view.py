"""A sweep as a page shows it: its ranking, what its loss depends on, and the loss by each key's values. From its folder
alone, and without Optuna."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.amounts import format_difference, percent
from lorakit.atomic_io import read_json_object
from lorakit.errors import UserError, first_line
from lorakit.report.chart import Chart, Line, draw
from lorakit.run_dir import RANKING, SWEEP, Run

_MOST_RUNS = 8
"""Trials that the page shows in full."""


@dataclass(frozen=True)
class CandidateRow:
    """A line of the ranking."""

    values: str
    loss: str
    against: str
    parameters: str
    is_recommended: bool


@dataclass(frozen=True)
class SweepView:
    """A sweep on the page; `counts`: how many trials ended how; `others`: those that are not in the ranking."""

    name: str
    in_words: str
    counts: str
    candidates: tuple[CandidateRow, ...]
    others: tuple[str, ...]
    importance: tuple[tuple[str, str], ...]
    noise: str
    charts: tuple[Chart, ...]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> tuple[SweepView, list[Path]]:
    """A sweep, and the folders of the runs that the page shows in full, the best first. UserError where nothing was
    ranked yet."""
    facts = read_json_object(folder / RANKING)
    if facts is not None:
        try:
            return _view(folder, facts)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, OSError) as error:
            remedy = "lorakit sweep FILE --rank writes it anew."
            raise UserError(f"{folder / RANKING}: damaged: {first_line(error)}. {remedy}") from error
    if (folder / RANKING).exists():
        raise UserError(f"{folder / RANKING}: damaged. lorakit sweep FILE --rank writes it anew.")
    raise UserError(f"{folder}: the sweep has no {RANKING} yet. lorakit sweep writes it when it ends.")


def _view(folder: Path, facts: dict[str, Any]) -> tuple[SweepView, list[Path]]:
    trials = [one for one in facts.get("trials") or [] if isinstance(one, dict)]
    recommended = json.dumps(facts.get("recommended"), sort_keys=True)
    states = [str(one.get("state")) for one in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    noise = facts.get("noise")
    view = SweepView(
        str(facts.get("name")),
        str(facts.get("in_words")),
        f"{len(trials)} trials: {counts}; {facts.get('steps', 0):,} steps in all",
        tuple(_candidate(one, recommended) for one in facts.get("candidates") or []),
        tuple(_other(one) for one in trials if one.get("state") not in ("finished", "waiting")),
        tuple((key, percent(share)) for key, share in (facts.get("importance") or {}).items()),
        f"{noise:.4f}" if isinstance(noise, int | float) else "",
        tuple(_charts(trials)),
    )
    ranked = sorted((one for one in trials if isinstance(one.get("loss"), int | float)), key=lambda one: one["loss"])
    folders = [folder / f"trial-{one['number']:04d}" for one in ranked]
    return view, [path for path in folders if Run(path).holds_results()][:_MOST_RUNS]


def _candidate(one: Mapping[str, Any], recommended: str) -> CandidateRow:
    against, compared = "", one.get("against_best")
    if isinstance(compared, dict):
        against = f"{format_difference(compared['difference'], 'nats')}, {compared['verdict']}"
    parameters = one.get("parameters")
    return CandidateRow(
        _values_in_words(one["values"]),
        f"{one['loss']:.4f}",
        against,
        f"{parameters:,}" if isinstance(parameters, int) else "-",
        json.dumps(one["values"], sort_keys=True) == recommended,
    )


def _other(one: Mapping[str, Any]) -> str:
    loss, reason = one.get("loss"), one.get("reason")
    measured = f" (loss {loss:.4f} at step {one.get('steps')})" if _is_number(loss) else ""
    return f"{one.get('state')}: {_values_in_words(one['values'])}{measured}" + (f": {reason}" if reason else "")


def _values_in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())


def _charts(trials: list[dict[str, Any]]) -> list[Chart]:
    """The loss of the finished trials by each key that has numbers."""
    charts = []
    for key in dict.fromkeys(key for one in trials for key in one.get("values") or {}):
        points = [
            (float(one["values"][key]), float(one["loss"]))
            for one in trials
            if one.get("state") == "finished" and _is_number(one.get("loss")) and _is_number(one["values"].get(key))
        ]
        values = {value for value, _ in points}
        if len(values) < 2:
            continue
        powers = min(values) > 0 and max(values) / min(values) >= 5
        if powers:
            points = [(math.log10(value), loss) for value, loss in points]
        line = Line("held-out loss", tuple(sorted(points)), "marked", 1)
        charts.append(draw(f"held-out loss by {key}", [line], along=key.rpartition(".")[2], powers=powers))
    return [chart for chart in charts if chart]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
