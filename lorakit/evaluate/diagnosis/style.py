"""The style of the answers: too short or long, never ending, all alike, or of another format than the references."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data.cleaning.text_checks import normalize_words
from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.diagnosis.parroting import split_words
from lorakit.evaluate.intervals import Interval, compare
from lorakit.evaluate.metric import mean

# The fewest and the most resamples, and how many numbers are drawn in all between them.
_RESAMPLES, _DRAWN = (100, 1_000), 1 << 23
_FEWEST_ROWS = 6
# With fewer words of both texts, a share of different pairs says little.
_FEWEST_WORDS = 500
_SHOWN = 5

LENGTH = Check(
    "answer length",
    "times longer or shorter than the references, by the median of words",
    2.0,
    "Flagged where the 95 % interval of the ratio of medians lies above 2 or below one half: wording alone seldom "
    "doubles a text, other content does.",
    "Look at the answers. If they are too short, look for short or cut answers among the training rows "
    "(data.overlong: truncate cuts them); if too long, for rows whose end-of-turn token is not trained (lorakit data "
    "RECIPE).",
)
UNFINISHED = Check(
    "unfinished answers",
    "share of answers cut off at max_new_tokens, beyond that of references longer than this",
    0.05,
    "Flagged where the 95 % interval of the difference lies above 5 %: one answer in twenty that does not end.",
    "Raise --max-new-tokens to see whether the answers end at all. If they go on for ever, the end-of-turn token is "
    "not learned: look at the loss mask (lorakit data RECIPE) and train on answers that are not cut.",
)
VARIETY = Check(
    "variety of answers",
    "entropy of the answers over that of the references on the same prompts",
    0.5,
    "1 is as many different answers as the references have, 0 the same answer to every prompt. At one half, ten "
    "different answers do the work of a hundred. Flagged where the 95 % interval lies below one half.",
    "Train with a lower learning rate or for more steps, give rows of rare answers a larger weight "
    "(data.train: {weight: ...}), and remove duplicate rows.",
)
VOCABULARY = Check(
    "vocabulary",
    "times as many different pairs of words as in as many words of the references",
    0.5,
    "Different texts are compared, with the same number of words of both, since longer texts always repeat more. "
    "Flagged below one half: where the references go on to a new pair, every second pair of the answers is "
    "a repetition.",
    "If single answers repeat themselves, train with a lower learning rate or for fewer steps; if all answers use the "
    "same phrases, give more varied training answers.",
)
FORMAT = Check(
    "format",
    "largest change of the share of answers that have a format, against the references",
    0.2,
    "Formats are what a text begins with: JSON, a code fence, a heading, a list, a table, a tag, or prose. Flagged "
    "where the 95 % interval of the change lies above 20 %: one answer in five of another format breaks what reads "
    "them.",
    "Look for rows of the other format among the training rows, and check that the chat template and the system prompt "
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
    cut: Sequence[bool],
    references_longer: Sequence[bool],
    seed: int = 0,
) -> list[Finding]:
    """How the answers are written, against the references to the same prompts; there is at least one.

    `cut`: whether each answer was stopped at max_new_tokens; `references_longer`: whether each reference has more
    tokens than that.
    """
    return [
        _length(answers, references, seed),
        _unfinished(cut, references_longer, seed),
        _variety(answers, references, prompts, seed),
        _vocabulary(answers, references),
        _format(answers, references, seed),
    ]


def _draw_rows(rows: int, seed: int) -> np.ndarray:
    """The row numbers (resamples, rows) of each resample."""
    fewest, most = _RESAMPLES
    return np.random.default_rng(seed).integers(0, rows, (max(fewest, min(most, _DRAWN // rows)), rows))


def _percentile_interval(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def _length(answers: Sequence[str], references: Sequence[str], seed: int) -> Finding:
    """The ratio of medians, the larger over the smaller one."""
    ours, theirs = (np.array([len(split_words(text)) for text in texts], float) for texts in (answers, references))
    details: dict[str, Any] = {"rows": len(ours)}
    if len(ours) < _FEWEST_ROWS or not np.median(theirs):
        return LENGTH.unmeasured("there are fewer than six answers, or references without words", details)
    for name, lengths in (("answers", ours), ("references", theirs)):
        marks = np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95])
        details[f"words of {name}"] = dict(zip(("5 %", "25 %", "median", "75 %", "95 %"), marks.tolist(), strict=True))
    # An empty answer counts as half a word, so that the ratio of medians stays a number.
    ratio = max(float(np.median(ours)), 0.5) / float(np.median(theirs))
    rows = _draw_rows(len(ours), seed)
    medians = np.median(ours[rows], axis=1), np.median(theirs[rows], axis=1)
    interval = _percentile_interval(np.maximum(medians[0], 0.5) / np.maximum(medians[1], 0.5))
    details["answers over references"] = ratio
    if ratio < 1 and interval:
        interval = Interval(1 / interval.high, 1 / interval.low, interval.method)
    flagged = interval is not None and interval.low > LENGTH.threshold
    return LENGTH.measured(max(ratio, 1 / ratio), flagged, interval, details)


def _unfinished(cut: Sequence[bool], references_longer: Sequence[bool], seed: int) -> Finding:
    ours, theirs = mean(np.array(cut, float)), mean(np.array(references_longer, float))
    details = {"rows": len(cut), "answers cut": ours.value, "references longer": theirs.value}
    return UNFINISHED.difference(compare({"": theirs}, {"": ours}, seed)[""], details)


def _variety(answers: Sequence[str], references: Sequence[str], prompts: Sequence[str], seed: int) -> Finding:
    """The ratio of entropies over different prompts: the same prompt has the same greedy answer."""
    first = [*{normalize_words(prompt): row for row, prompt in reversed([*enumerate(prompts)])}.values()]
    details: dict[str, Any] = {"different prompts": len(first)}
    kinds = []
    for name, texts in (("answers", answers), ("references", references)):
        normalized = [normalize_words(texts[row]) for row in first]
        counts = Counter(normalized)
        details[f"different {name}"] = len(counts)
        details[f"most frequent {name}"] = [
            {"text": text, "share": count / len(first)} for text, count in counts.most_common(_SHOWN)
        ]
        kinds.append(np.unique(normalized, return_inverse=True)[1])
    ours, theirs = kinds
    if len(first) < _FEWEST_ROWS or not theirs.any():
        return VARIETY.unmeasured("there are fewer than six different prompts, or all references are the same", details)
    ratios = np.array([_entropy_ratio(ours[rows], theirs[rows]) for rows in _draw_rows(len(first), seed)])
    interval = _percentile_interval(ratios)
    flagged = interval is not None and interval.high < VARIETY.threshold
    return VARIETY.measured(_entropy_ratio(ours, theirs), flagged, interval, details)


def _entropy_ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The entropy of the kinds (rows,) over that of others; NaN where those are all the same."""
    entropies = []
    for kinds in (ours, theirs):
        counts = np.bincount(kinds)
        shares = counts[counts > 0] / len(kinds)
        entropies.append(float(shares @ np.log(1 / shares)))
    return entropies[0] / entropies[1] if entropies[1] > 0 else float("nan")


def _vocabulary(answers: Sequence[str], references: Sequence[str]) -> Finding:
    # Each text once: how often it is given is the finding about variety.
    ours, theirs = (
        [word for text in dict.fromkeys(texts) for word in split_words(text)] for texts in (answers, references)
    )
    size = min(len(ours), len(theirs))
    details: dict[str, Any] = {"words compared": size}
    if size < _FEWEST_WORDS:
        return VOCABULARY.unmeasured(f"fewer than {_FEWEST_WORDS} words of answers and of references", details)
    for width in (1, 2, 3):
        shares = []
        for words in (ours, theirs):
            runs = [tuple(words[at : at + width]) for at in range(size - width + 1)]
            shares.append(len(set(runs)) / len(runs))
        details[f"distinct-{width}"] = {"answers": shares[0], "references": shares[1]}
    ratio = details["distinct-2"]["answers"] / details["distinct-2"]["references"]
    return VOCABULARY.measured(ratio, ratio < VOCABULARY.threshold, None, details)


def _format(answers: Sequence[str], references: Sequence[str], seed: int) -> Finding:
    """The change of the format whose share changes most, paired over rows."""
    ours, theirs = (np.array([_format_of(text) for text in texts]) for texts in (answers, references))
    details: dict[str, Any] = {"rows": len(ours)}
    for name, formats, texts in (("answers", ours, answers), ("references", theirs, references)):
        first_words = [next(iter(split_words(text[:200])), "") for text in texts]
        details[f"formats of {name}"] = _shares(formats.tolist())
        details[f"first words of {name}"] = dict([*_shares(first_words).items()][:_SHOWN])
    changes = {name: (ours == name).mean() - (theirs == name).mean() for name in sorted({*ours, *theirs})}
    changed = max(changes, key=lambda name: abs(changes[name]))
    details["format"] = str(changed)
    before, after = (theirs, ours) if changes[changed] >= 0 else (ours, theirs)
    less, more = (mean((formats == changed).astype(float)) for formats in (before, after))
    return FORMAT.difference(compare({"": less}, {"": more}, seed)[""], details)


def _format_of(text: str) -> str:
    return next((name for name, pattern in _FORMATS if pattern.match(text.lstrip())), "prose")


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in Counter(names).most_common()}
