"""Figures that answers have from nowhere: numbers that neither the prompt nor any training answer gives."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A number with the letters that follow it. A figure is up to three of them on one line with at most two words between,
# or one character of a script without spaces: `5.49`, `12. März 1874`, `1874年3月12日`.
_NUMBER = r"\d[\da-z]*"
_BETWEEN = r"(?:[^\w\n]{1,2}(?:[^\W\d]+[^\w\n]{1,2}){0,2}|[^\W\da-z])"
_NUMBERS = re.compile(_NUMBER, re.IGNORECASE)
_FIGURES = re.compile(rf"{_NUMBER}(?:{_BETWEEN}{_NUMBER}){{0,2}}", re.IGNORECASE)
# Answers looked at, which takes a second for very long ones.
_HELD_OUT, _TRAINING = 2_000, 20_000
_SHOWN = 3
# What a note is given on: a quarter of the answers, and so many (docs/planning.md, When not to train).
MOST_UNSUPPORTED = 0.25
_FEWEST = 10
TO_RETRIEVAL = (
    "Put such facts into the prompt (retrieval), in a column of the rows: lorakit new grounded --from grounded-answers "
    "starts such a recipe"
)

Pair = tuple[str, str]
"""A prompt with all that stands before the answer, and the answer."""


@dataclass(frozen=True)
class FigureSupport:
    """How many of the `answers` looked at have a figure that a model could only invent, and the first such figures."""

    answers: int
    unsupported: int
    examples: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.unsupported / self.answers

    @property
    def is_low(self) -> bool:
        """Whether so many answers would have to be invented that training is not the way."""
        return self.unsupported >= _FEWEST and self.share >= MOST_UNSUPPORTED

    def to_dict(self) -> dict[str, Any]:
        return {"answers": self.answers, "unsupported": self.unsupported, "examples": list(self.examples)}

    def __str__(self) -> str:
        shown = ", ".join(f"'{figure}'" for figure in self.examples)
        return (
            f"{self.unsupported:,} of {self.answers:,} answers have figures ({shown}) that neither their prompts nor "
            "the training answers give: an adapter would have to invent them"
        )


def measure_figures(held_out: Sequence[Pair], training: Sequence[str]) -> FigureSupport | None:
    """How well the figures of held-out answers are supported, None without answers on either side; case aside. A prompt
    that has a number itself supports all: it may be taken from there, or computed. A number that all prompts have, as
    of a system prompt, does not. Of very many answers some are looked at."""
    held_out = held_out[:: max(1, len(held_out) // _HELD_OUT)]
    training = training[:: max(1, len(training) // _TRAINING)]
    if not held_out or not training:
        return None
    known = {figure.lower() for answer in training for figure in _FIGURES.findall(answer)}
    numbers = [set(_NUMBERS.findall(prompt)) for prompt, _ in held_out]
    in_all = set[str].intersection(*numbers)
    unsupported = []
    for (_, answer), own in zip(held_out, numbers, strict=True):
        new = (figure for figure in _FIGURES.findall(answer) if figure.lower() not in known)
        if own <= in_all and (figure := next(new, None)):
            unsupported.append(figure)
    return FigureSupport(len(held_out), len(unsupported), tuple(unsupported[:_SHOWN]))
