"""Style collapse: answers that are too short, never end, are all alike, or do not look like the references."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.diagnosis.spans import split_words
from lorakit.evaluate.intervals import Interval, compare
from lorakit.evaluate.metric import mean

# Resamples, at the least and at the most, and numbers drawn at once.
_RESAMPLES, _DRAWN = (100, 1_000), 1 << 23
_LEAST_ROWS = 6
# Words of both texts below which a share of different pairs says little.
_LEAST_WORDS = 500
_SHOWN = 5

LENGTH = Check(
    "answer length",
    "times longer or shorter than the references, by the median of words",
    2.0,
    "Flagged where the 95 % interval of the ratio of medians lies wholly above 2 or below one half: wording alone "
    "seldom doubles a text, other content does.",
    "Look at the answers. If they are too short, look for short or cut answers among the training rows "
    "(data.overlong: truncate cuts them); if too long, for rows whose end-of-turn token is not trained (lorakit data "
    "RECIPE).",
)
UNFINISHED = Check(
    "unfinished answers",
    "share of answers cut off at max_new_tokens, more than references that are longer than that",
    0.05,
    "Flagged where the 95 % interval of the difference lies above 5 %: one answer in twenty that does not end.",
    "Raise --max-new-tokens to see whether the answers end at all. If they go on for ever, the end-of-turn token is "
    "not learned: look at the loss mask (lorakit data RECIPE) and train on answers that are not cut.",
)
VARIETY = Check(
    "variety of answers",
    "entropy of the answers over that of the references on the same prompts",
    0.5,
    "1 is as many different answers as the references have, 0 the same answer to every prompt. At one half, what takes "
    "the references a hundred different answers is done with ten. Flagged where the 95 % interval lies below one half.",
    "Train with a lower learning rate or for more steps, give rows of rare "
    "answers a larger weight (data.train: {weight: ...}), and take out rows that say the same.",
)
VOCABULARY = Check(
    "vocabulary",
    "different pairs of words over those of as many words of the references",
    0.5,
    "Compared are different texts, as many words of both, since longer texts always repeat more. Flagged below one "
    "half: where the references go on to a new pair, every second pair of the answers has been there before.",
    "If single answers repeat themselves, train with a lower learning rate or for fewer steps; if all answers use the "
    "same phrases, give more varied training answers.",
)
FORMAT = Check(
    "format",
    "largest change of the share that a format has, against the references",
    0.2,
    "Formats are what a text begins with: JSON, a code fence, a heading, a list, a table, a tag, or prose. Flagged "
    "where the 95 % interval of the change lies above 20 %: one answer in five of another format "
    "breaks what reads them.",
    "Look for rows of the other format among the training rows, and whether the chat template and the system prompt "
    "are those of the training.",
)

_FORMATS = (
    ("empty", re.compile(r"\Z")),
    ("JSON", re.compile(r"[{\[]")),
    ("code fence", re.compile(r"```|~~~")),
    ("heading", re.compile(r"#{1,6} ")),
    ("list", re.compile(r"([-*+•]|\d{1,3}[.)])\s")),
    ("table", re.compile(r"\|")),
    ("tag", re.compile(r"<[A-Za-z/!?]")),
)


def measure_style(
    answers: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
    cut: Sequence[bool] | None = None,
    references_longer: Sequence[bool] | None = None,
    seed: int = 0,
) -> list[Finding]:
    """How the answers are written, against the references to the same prompts: a finding each for length, ends,
    variety, vocabulary and format.

    `cut`: whether each answer was stopped at max_new_tokens; `references_longer`: whether each reference has more
    tokens than that. Without both there is no finding about ends.
    """
    found = [_length(answers, references, seed)]
    if cut is not None and references_longer is not None:
        found.append(_unfinished(cut, references_longer, seed))
    return [
        *found,
        _variety(answers, references, prompts, seed),
        _vocabulary(answers, references),
        _format(answers, references, seed),
    ]


def _draws(rows: int, seed: int) -> np.ndarray:
    """The rows (resamples, rows) of each resample."""
    least, most = _RESAMPLES
    return np.random.default_rng(seed).integers(0, rows, (max(least, min(most, _DRAWN // rows)), rows))


def _percentiles(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def _length(answers: Sequence[str], references: Sequence[str], seed: int) -> Finding:
    """The ratio of medians, the larger over the smaller one."""
    ours, theirs = (np.array([_size(text) for text in texts], float) for texts in (answers, references))
    details: dict[str, Any] = {"rows": len(ours)}
    if len(ours) < _LEAST_ROWS or not np.median(theirs):
        return LENGTH.unmeasured("there are fewer than six answers, or references without words", details)
    for name, lengths in (("answers", ours), ("references", theirs)):
        marks = np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95])
        details[f"words of {name}"] = dict(zip(("5 %", "25 %", "median", "75 %", "95 %"), marks.tolist(), strict=True))
    # An empty answer counts as half a word, so that the ratio of medians stays a number.
    ratio = max(float(np.median(ours)), 0.5) / float(np.median(theirs))
    rows = _draws(len(ours), seed)
    medians = np.median(ours[rows], axis=1), np.median(theirs[rows], axis=1)
    interval = _percentiles(np.maximum(medians[0], 0.5) / np.maximum(medians[1], 0.5))
    details["answers over references"] = ratio
    if ratio < 1 and interval:
        interval = Interval(1 / interval.high, 1 / interval.low, interval.method)
    flagged = interval is not None and interval.low > LENGTH.threshold
    return LENGTH.measured(max(ratio, 1 / ratio), flagged, interval, details)


def _unfinished(cut: Sequence[bool], references_longer: Sequence[bool], seed: int) -> Finding:
    if not len(cut):
        return UNFINISHED.unmeasured("there are no answers")
    ours, theirs = mean(np.array(cut, float)), mean(np.array(references_longer, float))
    details = {"rows": len(cut), "answers cut": ours.value, "references longer": theirs.value}
    found = compare({"": theirs}, {"": ours}, seed)[""]
    flagged = found.interval is not None and found.interval.low > UNFINISHED.threshold
    return UNFINISHED.measured(found.difference, flagged, found.interval, details)


def _variety(answers: Sequence[str], references: Sequence[str], prompts: Sequence[str], seed: int) -> Finding:
    """The ratio of entropies over prompts that differ: the same prompt has the same greedy answer."""
    first = [*{_plain(prompt): row for row, prompt in reversed([*enumerate(prompts)])}.values()]
    ours, theirs = (_kinds([texts[row] for row in first]) for texts in (answers, references))
    details: dict[str, Any] = {"different prompts": len(first)}
    for name, texts in (("answers", answers), ("references", references)):
        counted = Counter(_plain(texts[row]) for row in first)
        details[f"different {name}"] = len(counted)
        details[f"most frequent {name}"] = [
            {"text": text, "share": count / len(first)} for text, count in counted.most_common(_SHOWN)
        ]
    if len(first) < _LEAST_ROWS or len(set(theirs.tolist())) < 2:
        return VARIETY.unmeasured("there are fewer than six different prompts, or all references are the same", details)
    rows = _draws(len(first), seed)
    resampled = [_entropies(kinds, rows) for kinds in (ours, theirs)]
    with np.errstate(divide="ignore", invalid="ignore"):
        interval = _percentiles(resampled[0] / resampled[1])
    every = np.arange(len(first))[None]
    value = float(_entropies(ours, every)[0] / _entropies(theirs, every)[0])
    flagged = interval is not None and interval.high < VARIETY.threshold
    return VARIETY.measured(value, flagged, interval, details)


def _vocabulary(answers: Sequence[str], references: Sequence[str]) -> Finding:
    # Each text once: how often it is given is the finding about variety.
    ours, theirs = ([word for text in dict.fromkeys(texts) for word in _words(text)] for texts in (answers, references))
    size = min(len(ours), len(theirs))
    details: dict[str, Any] = {"words compared": size}
    if size < _LEAST_WORDS:
        return VOCABULARY.unmeasured(f"fewer than {_LEAST_WORDS} words of answers and of references", details)
    ratios = {}
    for span in (1, 2, 3):
        shares = [_distinct(words[:size], span) for words in (ours, theirs)]
        ratios[span] = shares[0] / shares[1]
        details[f"distinct-{span}"] = {"answers": shares[0], "references": shares[1]}
    return VOCABULARY.measured(ratios[2], ratios[2] < VOCABULARY.threshold, None, details)


def _format(answers: Sequence[str], references: Sequence[str], seed: int) -> Finding:
    """The change of the format whose share changes most, paired over rows."""
    ours, theirs = (np.array([_format_of(text) for text in texts]) for texts in (answers, references))
    details: dict[str, Any] = {"rows": len(ours)}
    for name, kinds, texts in (("answers", ours, answers), ("references", theirs, references)):
        details[f"formats of {name}"] = _shares(kinds.tolist())
        details[f"first words of {name}"] = dict([*_shares([_first_word(text) for text in texts]).items()][:_SHOWN])
    if not len(ours):
        return FORMAT.unmeasured("there are no answers", details)
    changes = {kind: (ours == kind).mean() - (theirs == kind).mean() for kind in sorted({*ours, *theirs})}
    kind = max(changes, key=lambda name: abs(changes[name]))
    details["format"] = str(kind)
    less, more = (theirs == kind, ours == kind) if changes[kind] >= 0 else (ours == kind, theirs == kind)
    found = compare({"": mean(less.astype(float))}, {"": mean(more.astype(float))}, seed)[""]
    flagged = found.interval is not None and found.interval.low > FORMAT.threshold
    return FORMAT.measured(found.difference, flagged, found.interval, details)


def _kinds(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, equal for equal texts."""
    return np.unique([_plain(text) for text in texts], return_inverse=True)[1]


def _entropies(kinds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entropy in nats of the kinds that each resample (resamples, rows) draws."""
    drawn = np.sort(kinds[rows], axis=1)
    resample, place = np.nonzero(np.diff(drawn, axis=1, prepend=-1))
    counts = np.diff(resample * rows.shape[1] + place, append=drawn.size)
    terms = np.bincount(resample, counts * np.log(counts), minlength=len(rows))
    return np.log(rows.shape[1]) - terms / rows.shape[1]


def _distinct(words: Sequence[str], span: int) -> float:
    """The share of different runs among all runs of as many words."""
    runs = [tuple(words[at : at + span]) for at in range(len(words) - span + 1)]
    return len(set(runs)) / len(runs)


def _format_of(text: str) -> str:
    begun = text.lstrip()
    return next((name for name, pattern in _FORMATS if pattern.match(begun)), "prose")


def _first_word(text: str) -> str:
    return next(iter(_words(text[:200])), "")


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in Counter(names).most_common()}


def _plain(text: str) -> str:
    """The text by which answers are the same: white space and case aside."""
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    return split_words(text)[0]


def _size(text: str) -> int:
    return len(_words(text))
