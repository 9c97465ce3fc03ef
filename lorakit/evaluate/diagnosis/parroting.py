"""Parroting: answers copied from the training answers; and memorization: what was learned of training rows alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.diagnosis.spans import SPAN, CopiedText, SpanIndex, find_copied
from lorakit.evaluate.intervals import Comparison, compare, intervals
from lorakit.evaluate.metric import Measure, mean

# An answer is copied where spans cover half of it; or one is this long: 50 tokens, by which Carlini and others (2023,
# "Quantifying Memorization Across Neural Language Models") call a text memorized, are about 40 English words.
_COVERED, _LONG = 0.5, 40
_CASES = 5

PARROTING = Check(
    "parroting",
    "share of answers copied from training answers, more than is to be expected",
    0.05,
    f"An answer is copied where spans of {SPAN} words or more that stand in a few training answers, and neither in its "
    f"prompt nor in its reference, cover half of it, or one span has {_LONG} words. To be expected is the share of the "
    "references or of the base model's answers that is copied in the same sense, whichever is larger: a task whose "
    "right answers resemble each other is no fault. Flagged where the 95 % interval of the difference lies above 5 %: "
    "one answer in twenty, below which a few stock phrases would do.",
    "Train for fewer steps or epochs (train.early_stopping), with a lower learning rate or rank, or with more varied "
    "rows; look for rows that are repeated many times (lorakit data RECIPE).",
)
MEMORIZATION = Check(
    "memorization",
    "share of what was learned on training rows that held-out rows do not show",
    0.5,
    "Learned is by how much the loss is lower than the base model's, in nats a token. Where held-out rows gain less "
    "than half of what training rows gain, more of the training went into remembering rows than into the task. Flagged "
    "where the 95 % interval lies above one half.",
    "Train for fewer epochs (train.early_stopping stops at the lowest held-out loss), with a lower rank, or on more "
    "rows. Look also whether the held-out rows are of the same kind as the training rows.",
)


def measure_parroting(
    answers: Sequence[str],
    prompts: Sequence[str],
    references: Sequence[str],
    index: SpanIndex,
    base_answers: Sequence[str] | None = None,
    seed: int = 0,
) -> Finding:
    """How many more answers are copied from the training answers than is to be expected on the same prompts.

    `index`: `index_spans` of the training answers. Without `base_answers`, what is to be expected is the references'
    share alone.
    """
    rows = [*zip(answers, prompts, references, strict=True)]
    spans = [find_copied(answer, index, (prompt, reference)) for answer, prompt, reference in rows]
    natural = {"references": [find_copied(reference, index, (prompt,)) for _, prompt, reference in rows]}
    if base_answers is not None:
        given = zip(base_answers, prompts, references, strict=True)
        natural["base"] = [find_copied(answer, index, (prompt, reference)) for answer, prompt, reference in given]
    details: dict[str, Any] = {
        "rows": len(rows),
        "training answers": index.answers,
        "copied": _share(spans),
        "copied words": sum(one.covered for one in spans) / max(1, sum(one.words for one in spans)),
        **{f"copied by {name}": _share(texts) for name, texts in natural.items()},
        "cases": _cases(spans),
    }
    if not rows:
        return PARROTING.unmeasured("there are no answers", details)
    expected = max(natural.values(), key=_share)
    found: Comparison = compare({"": _measure(expected)}, {"": _measure(spans)}, seed)[""]
    flagged = found.interval is not None and found.interval.low > PARROTING.threshold
    return PARROTING.measured(found.difference, flagged, found.interval, details)


def _is_copied(one: CopiedText) -> bool:
    return one.longest >= _LONG or (one.covered > 0 and one.share >= _COVERED)


def _share(texts: Sequence[CopiedText]) -> float:
    return sum(map(_is_copied, texts)) / max(1, len(texts))


def _measure(texts: Sequence[CopiedText]) -> Measure:
    return mean(np.array([_is_copied(one) for one in texts], float), higher=False)


def _cases(spans: Sequence[CopiedText]) -> list[dict[str, Any]]:
    """The longest spans: of which answer, how much of it, and from which training answer, each counted from 0."""
    worst = sorted(((one, row) for row, one in enumerate(spans) if one.covered), key=lambda pair: -pair[0].longest)
    return [
        {
            "answer": row,
            "words": one.longest,
            "share": round(one.share, 3),
            "span": one.text,
            "training answer": one.answer,
        }
        for one, row in worst[:_CASES]
    ]


def measure_memorization(
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray],
    seed: int = 0,
) -> Finding:
    """How much of what the model learned on training rows it does not show on held-out rows.

    `train` (a sample of the training rows will do) and `held_out`: the summed nats of each row by the base model, those
    by the trained model, and its trained tokens.
    """
    (base, tuned, tokens), (held_base, held_tuned, held_tokens) = train, held_out
    statistics = np.zeros((len(base) + len(held_base), 6))
    statistics[: len(base), :3] = np.stack([base, tuned, tokens], axis=1)
    statistics[len(base) :, 3:] = np.stack([held_base, held_tuned, held_tokens], axis=1)
    measures = {
        "learned on training rows": Measure(statistics, lambda sums: _learned(sums)[0], "nats"),
        "learned on held-out rows": Measure(statistics, lambda sums: _learned(sums)[1], "nats"),
        "gap": Measure(statistics, _gap, "nats", higher=False),
        "share": Measure(statistics, _not_shown, "share", higher=False),
    }
    found = intervals(measures, seed)
    details: dict[str, Any] = {"training rows": len(base), "held-out rows": len(held_base)}
    for name in ("learned on training rows", "learned on held-out rows", "gap"):
        interval = found[name]
        details[f"{name} (nats)"] = {
            "value": measures[name].value,
            "interval": interval and [interval.low, interval.high],
        }
    learned, share = found["learned on training rows"], found["share"]
    if learned is None or share is None:
        return MEMORIZATION.unmeasured("there are too few rows for an interval", details)
    if learned.low <= 0:
        return MEMORIZATION.unmeasured("the model has not learned anything on its training rows", details)
    return MEMORIZATION.measured(measures["share"].value, share.low > MEMORIZATION.threshold, share, details)


def _learned(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much the loss fell on training and on held-out rows, of sums (..., 6)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        train = (sums[..., 0] - sums[..., 1]) / sums[..., 2]
        return train, (sums[..., 3] - sums[..., 4]) / sums[..., 5]


def _gap(sums: np.ndarray) -> np.ndarray:
    """Held-out loss minus training loss of the trained model."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 4] / sums[..., 5] - sums[..., 1] / sums[..., 2])


def _not_shown(sums: np.ndarray) -> np.ndarray:
    train, held_out = _learned(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - held_out / train)
