"""A line chart as plain geometry: what the page's template writes as SVG, and what its script reads out."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.report.curves import Points, thin, value_range

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 30
_LOG_FROM = 10  # values that span more than this factor get a logarithmic axis
_MOST_TICKS = 6


@dataclass(frozen=True)
class Line:
    """A named line. `kind`: how the page draws it (`raw`, `smooth`, `marked`); `colour`: the number of its colour."""

    name: str
    points: Points
    kind: str = "smooth"
    colour: int = 0


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class DrawnLine:
    """A line in the chart's own units: an SVG path, and its single points where they are marked."""

    name: str
    kind: str
    colour: int
    path: str
    marks: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """A chart of values by step. `described`: in words, for those who do not see it; `data`: its points as JSON."""

    title: str
    note: str
    lines: tuple[DrawnLine, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    best: tuple[float, float, str] | None
    described: str
    data: str
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def draw(
    title: str,
    lines: Sequence[Line],
    best: tuple[float, float] | None = None,
    may_be_log: bool = True,
    along: str = "step",
    powers: bool = False,
) -> Chart | None:
    """The chart of some lines, and a mark at the best point; None where no line has a point. `may_be_log`: values of
    several magnitudes get a logarithmic axis. `along`: what the points are of; with `powers` its logarithm to ten."""

    def named(step: float) -> str:
        return short(10**step) if powers else f"{step:,.0f}" if step == int(step) else short(step)

    lines = [Line(line.name, thin(line.points), line.kind, line.colour) for line in lines if line.points]
    values, steps = value_range([line.points for line in lines]), [step for line in lines for step, _ in line.points]
    if values is None:
        return None
    first, last = min(steps), max(steps)
    is_log = may_be_log and values[0] > 0 and values[1] / values[0] > _LOG_FROM and len(set(steps)) > 1
    low, high, y_values = _log_axis(*values) if is_log else _even_axis(*values)
    scale = math.log if is_log else float

    def x(step: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * ((step - first) / (last - first) if last > first else 0.5), 1)

    def y(value: float) -> float:
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share, 1)

    def drawn(line: Line) -> DrawnLine:
        path = "M" + "L".join(f"{x(step)} {y(value)}" for step, value in line.points)
        is_marked = line.kind == "marked" or len(line.points) == 1
        marks = [(x(step), y(value), f"{along} {named(step)}: {short(value)}") for step, value in line.points]
        return DrawnLine(line.name, line.kind, line.colour, path, tuple(marks) if is_marked else ())

    ticks = [step for step in _even_axis(first, last)[2] if first <= step <= last]
    steps_axis = [step for step in ticks if step == int(step)] or [first, last]
    marked = (x(best[0]), y(best[1]), f"best: {short(best[1])} at {along} {named(best[0])}") if best else None
    return Chart(
        title,
        "logarithmic axis" if is_log else "",
        tuple(map(drawn, lines)),
        tuple(Tick(x(step), named(step)) for step in steps_axis),
        tuple(Tick(y(value), short(value)) for value in y_values),
        marked,
        "; ".join(_in_words(line, along, named) for line in lines),
        json.dumps(
            {"first": first, "last": last, "along": along, "powers": powers, "lines": [_data(line) for line in lines]}
        ),
    )


def short(value: float) -> str:
    """A number with at most four digits that count: `0.1933`, `1.3e-3`, `1,250`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _in_words(line: Line, along: str, named: Callable[[float], str]) -> str:
    (first, begin), (last, end) = line.points[0], line.points[-1]
    return f"{line.name}: {short(begin)} at {along} {named(first)}, {short(end)} at {along} {named(last)}"


def _data(line: Line) -> dict[str, Any]:
    points = [[step, float(f"{value:.5g}")] for step, value in line.points]
    return {"name": line.name, "kind": line.kind, "colour": line.colour, "points": points}


def _even_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """The ends of an axis around some values, and its round ticks."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    width = (high - low) / _MOST_TICKS
    unit = 10.0 ** math.floor(math.log10(width))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= width * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return start * step, end * step, [number * step for number in range(start, end + 1)]


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """The same of a logarithmic axis: powers of ten, with 2 and 5 where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        start = max((tick for tick in ticks if tick <= low * (1 + 1e-9)), default=ticks[0])
        end = min((tick for tick in ticks if tick >= high * (1 - 1e-9)), default=ticks[-1])
        between = [tick for tick in ticks if start <= tick <= end]
        if len(between) <= _MOST_TICKS + 2 or factors == (1,):
            break
    every = math.ceil(len(between) / (_MOST_TICKS + 2))
    return start, end, between[::every]
