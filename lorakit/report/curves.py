"""What a run's log says step by step, and how a long line is thinned to what a page can show. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lorakit.run_dir import Run

Points = tuple[tuple[float, float], ...]
"""Steps and values, by step."""

FEW = 50
"""Points up to which a line is not averaged."""
_SMOOTHED = 25  # an average reaches back over this part of the run
_BEYOND = 1e100
"""No training measures more; an axis could not show it, nor a number that is none."""


@dataclass(frozen=True)
class Curves:
    """Values by step; a name that was never logged has no points. `memory_ran_out`: the steps at which it did."""

    loss: Points
    held_out: Points
    learning_rate: Points
    grad_norm: Points
    speed: Points
    memory_ran_out: tuple[int, ...] = ()


def read_curves(run: Run) -> Curves:
    """The curves of a run's log; of a step that was repeated after a resume, the last value."""
    lines = list(reversed(list(run.read_log("step"))))

    def points(key: str) -> Points:
        values = {}
        for line in lines:
            step, value = line.get("step"), line.get(key)
            if _is_step(step) and isinstance(value, int | float) and abs(value) < _BEYOND:
                values[float(step)] = float(value)
        return tuple(sorted(values.items()))

    ran_out = sorted({line["step"] for line in lines if "out_of_memory" in line and _is_step(line.get("step"))})
    return Curves(
        points("loss"),
        points("eval_loss"),
        points("learning_rate"),
        points("grad_norm"),
        points("trained_tokens_per_second"),
        tuple(ran_out),
    )


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < _BEYOND


def smooth(points: Points) -> Points:
    """The exponential moving average of a line, without the pull of its start towards zero (Kingma and Ba 2015)."""
    keep = 1 - min(1.0, _SMOOTHED / max(len(points), 1))
    total, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, total / weight))
    return tuple(smoothed)


def averaged(points: Points) -> Points:
    """A line as it is read at a glance: averaged where it is long, as it is where an average would lag behind it."""
    return smooth(points) if len(points) > FEW else points


def thin(points: Points, most: int = 400) -> Points:
    """At most about `most` points of a line: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(points) <= most:
        return points
    stretches = most // 2
    edges = [round(number * len(points) / stretches) for number in range(stretches + 1)]
    chosen: list[tuple[float, float]] = []
    for start, end in pairwise(edges):
        stretch = points[start:end]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        chosen += sorted(ends)
    return tuple(dict.fromkeys([points[0], *chosen, points[-1]]))


def value_range(lines: Sequence[Points]) -> tuple[float, float] | None:
    """The lowest and the highest value of some lines; None where there are no points."""
    values = [value for points in lines for _, value in points]
    return (min(values), max(values)) if values else None
