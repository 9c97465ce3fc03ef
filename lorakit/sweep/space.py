"""What is tried for one key: a list of values, or a range. Without torch and Optuna."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

MOST_VALUES = 1_000
"""Combinations up to which a grid is made."""


@dataclass(frozen=True)
class Choices:
    """Values of any kind, in the order written."""

    values: tuple[Any, ...]

    @property
    def finite(self) -> tuple[Any, ...] | None:
        return self.values

    def suggest(self, trial: Any, key: str) -> Any:
        """A value of an Optuna trial; what is no plain value is chosen by its number."""
        number = trial.suggest_categorical(key, list(range(len(self.values))))
        return self.values[number]

    def encode(self, value: Any) -> Any:
        """How Optuna stores a value."""
        return list(map(_hashable, self.values)).index(_hashable(value))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them; evenly, or evenly in their logarithms. `points`: how many a grid
    takes of them; None where it cannot."""

    low: float
    high: float
    is_log: bool
    is_whole: bool
    points: int | None = None

    @property
    def finite(self) -> tuple[Any, ...] | None:
        """The values of a grid, each once."""
        if self.points is None:
            return None
        ends = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        shares = [number / (self.points - 1) for number in range(self.points)] if self.points > 1 else [0.5]
        places = [ends[0] + (ends[1] - ends[0]) * share for share in shares]
        values = [math.exp(place) if self.is_log else place for place in places]
        rounded = [round(value) if self.is_whole else float(f"{value:.4g}") for value in values]
        return tuple(dict.fromkeys(rounded))

    def suggest(self, trial: Any, key: str) -> Any:
        """A value of an Optuna trial."""
        if self.is_whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.is_log)
        return trial.suggest_float(key, self.low, self.high, log=self.is_log)

    def encode(self, value: Any) -> Any:
        """How Optuna stores a value."""
        return value


Space = Choices | Range


def parse_space(written: Any) -> Space | str:
    """What a list or a mapping of a sweep means, or in words why it means nothing."""
    if isinstance(written, list):
        if not written:
            return "the list has no values"
        values = [_hashable(value) for value in written]
        twice = next((value for at, value in enumerate(values) if value in values[:at]), None)
        return f"{twice!r} is there twice" if twice is not None else Choices(tuple(written))
    (word, *_), points = [key for key in written if key != "points"], written.get("points")
    ends = written[word]
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))):
        return f"{word} takes two numbers, the lowest and the highest"
    low, high = ends
    if not low < high:
        return f"the second number of {word} is the higher one"
    if points is not None and not (isinstance(points, int) and not isinstance(points, bool) and 1 < points <= 100):
        return "points takes a whole number from 2 to 100"
    if word == "log2":
        return _powers_of_two(low, high)
    if word == "log" and low <= 0:
        return "log takes numbers above 0"
    is_whole = isinstance(low, int) and isinstance(high, int)
    return Range(float(low), float(high), word == "log", is_whole, points)


RANGES = ("log2", "log", "range")
"""Words by which a mapping is a range: {log: [1e-5, 1e-3]}, {log2: [4, 64]}, {range: [0, 0.1]}, each with `points`."""


def is_range(written: Any) -> bool:
    """Whether a mapping is a range, and not a section or a value."""
    words = {*written} - {"points"} if isinstance(written, dict) else set()
    return len(words) == 1 and words <= {*RANGES}


def _powers_of_two(low: float, high: float) -> Choices | str:
    if not (low > 0 and math.log2(low).is_integer() and math.log2(high).is_integer()):
        return "log2 takes powers of two, such as [4, 64]"
    powers = [2.0**power for power in range(int(math.log2(low)), int(math.log2(high)) + 1)]
    return Choices(tuple(int(power) if power.is_integer() else power for power in powers))


def grid(spaces: dict[str, Space]) -> Iterator[dict[str, Any]]:
    """Every combination, that of the middle values first: a good early trial lets the others be cut short sooner."""
    values = [_from_the_middle(space.finite or ()) for space in spaces.values()]
    for combination in sorted(product(*(enumerate(one) for one in values)), key=lambda one: sum(at for at, _ in one)):
        yield {key: value for key, (_, value) in zip(spaces, combination, strict=True)}


def _from_the_middle(values: Sequence[Any]) -> list[Any]:
    middle = (len(values) - 1) / 2
    numbers = sorted(range(len(values)), key=lambda at: (abs(at - middle), at))
    return [values[at] for at in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _hashable(value: Any) -> Any:
    return repr(value) if isinstance(value, list | dict) else (type(value).__name__, value)
