"""A leak: rows to score on that the model was trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data.cleaning.dataset_checks import Leak
from lorakit.data.cleaning.row_stats import RowStats
from lorakit.data.filter_and_split import find_leaks
from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.intervals import wilson

_CASES = 5
NEARLY = "nearly the same as a training row"
LEAK = Check(
    "leak",
    "share of the evaluation rows that stand in the training rows",
    0.0,
    "A row leaks where a training row says the same, or gives the same answer to the same prompt, white space and case "
    "aside. One is enough to be flagged, for it is counted, not estimated, and its score says nothing.",
    "Take these rows out of the evaluation data, or out of the training rows and train again "
    "(data.clean: {leakage: fix}).",
)


def measure_leak(train: RowStats, held_out: RowStats) -> Finding:
    """Which evaluation rows the training rows hold.

    Both are from `lorakit.data.cleaning.row_stats.compute_row_stats`; near-duplicates are looked for where both have
    signatures. They, and rows whose prompt alone was trained on with another answer, are in the details only: in
    data of one form, rows that resemble each other may be different rows.
    """
    rows = len(held_out.content)
    if not rows:
        return LEAK.unmeasured("there are no rows")
    # The data room names the training rows that are held out; with the sides exchanged it names the rows to score.
    same = find_leaks(held_out, train, nearly=False)
    details: dict[str, Any] = {
        "rows": rows,
        "training rows": len(train.content),
        "leaked": len(same),
        "cases": _cases(same),
        "same prompt, other answer": _prompts_only(train, held_out, same),
    }
    if train.signature is not None and held_out.signature is not None:
        near = find_leaks(held_out, train, nearly=True)
        details |= {"nearly the same": len(near), "near cases": _cases(near)}
    return LEAK.measured(len(same) / rows, bool(same), wilson(len(same), rows), details)


def _cases(leaks: Sequence[Leak]) -> list[dict[str, int]]:
    """The first rows, and the training row of each, counted from 0."""
    return [{"row": one.row, "training row": one.held_out} for one in leaks[:_CASES]]


def _prompts_only(train: RowStats, held_out: RowStats, same: Sequence[Leak]) -> int:
    """Rows whose prompt is trained on, but for those that leak."""
    asked = (held_out.prompt != 0) & np.isin(held_out.prompt, train.prompt)
    asked[[one.row for one in same]] = False
    return int(asked.sum())
