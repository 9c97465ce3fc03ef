"""Held-out rows as a run answered them while it learned (`evaluate.samples`), from its log. Without torch."""

from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from lorakit.report.scores import limited
from lorakit.run_dir import Run

_MOST_ROWS, _MOST_ANSWERS = 10, 12  # answers that follow each other and are the same are one
_MOST_CHARACTERS = 1_000  # of an answer


@dataclass(frozen=True)
class LearnedAnswer:
    """An answer, and the steps after which it was given."""

    steps: str
    text: str
    was_cut: bool


@dataclass(frozen=True)
class LearnedRow:
    """A held-out row with the answers that it was given; `left_out`: how many others."""

    where: str
    prompt: str
    reference: str
    answers: tuple[LearnedAnswer, ...]
    left_out: int


def learned_rows(run: Run) -> list[LearnedRow]:
    """The first rows that a run answered; of many answers to one, some from all along the run, with the first and the
    last. Of a step that was repeated it is the newest."""
    places, by_row = list[str](), list[dict[int, tuple[str, bool]]]()
    for line in run.read_log("samples"):
        for at, one in enumerate(line["samples"][:_MOST_ROWS]):
            if at == len(by_row):
                places.append(str(one["row"]))
                by_row.append({})
            by_row[at].setdefault(int(line["step"]), (str(one["answer"]), bool(one.get("cut"))))
    rows = []
    for where, text, answers in zip(places, chain(run.read_sampled_rows(), repeat({})), by_row, strict=False):
        merged = _merge(sorted(answers.items()))
        shown = _spread(merged)
        prompt, reference = limited(text.get("prompt")), limited(text.get("reference"))
        rows.append(LearnedRow(where, prompt, reference, tuple(shown), len(merged) - len(shown)))
    return rows


def _merge(answers: list[tuple[int, tuple[str, bool]]]) -> list[LearnedAnswer]:
    """Answers by step, those that follow each other and are the same as one."""
    runs: list[tuple[int, int, tuple[str, bool]]] = []
    for step, answer in answers:
        if runs and runs[-1][2] == answer:
            runs[-1] = (runs[-1][0], step, answer)
        else:
            runs.append((step, step, answer))
    return [
        LearnedAnswer(
            f"{first:,}" if first == last else f"{first:,} to {last:,}", limited(text, _MOST_CHARACTERS), was_cut
        )
        for first, last, (text, was_cut) in runs
    ]


def _spread(answers: list[Any]) -> list[Any]:
    if len(answers) <= _MOST_ANSWERS:
        return answers
    return [answers[round(at * (len(answers) - 1) / (_MOST_ANSWERS - 1))] for at in range(_MOST_ANSWERS)]
