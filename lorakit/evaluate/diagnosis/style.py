"""The style of the answers: too short or long, never ending, all alike, or of another format than the references."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.data.cleaning.text_checks import normalize_words
from lorakit.evaluate.diagnosis.copying import split_words
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.metric import Interval, compare, mean

# The fewest and the most resamples, and how many numbers are drawn in all between them.
_RESAMPLES, _DRAWN = (100, 1_000), 1 << 23
_FEWEST_ROWS = 6
# With fewer words of both texts, a share of different pairs says little.
_FEWEST_WORDS = 500
_SHOWN = 5

LENGTH = Finding(
    "answer length",
    unit="times longer or shorter than the references, by the median of words",
    threshold=2.0,
    why="Flagged where the 95 % interval of the ratio of medians lies above 2 or below one half: wording alone "
    "seldom doubles a text, other content does.",
    remedy="Look at the answers. If they are too short, look for short or cut answers among the training rows "
    "(data.overlong: truncate cuts them); if too long, for rows whose end-of-turn token is not trained (lorakit data "
    "RECIPE).",
)
UNFINISHED = Finding(
    "unfinished answers",
    unit="share of answers cut off at max_new_tokens, beyond that of references longer than this",
    threshold=0.05,
    why="Flagged where the 95 % interval of the difference lies above 5 %: one answer in twenty that does not end.",
    remedy="Raise --max-new-tokens to see whether the answers end at all. If they go on for ever, the end-of-turn "
    "token is not learned: look at the loss mask (lorakit data RECIPE) and train on answers that are not cut.",
)
VARIETY = Finding(
    "variety of answers",
    unit="entropy of the answers over that of the references on the same prompts",
    threshold=0.5,
    why="1 is as many different answers as the references have, 0 the same answer to every prompt. At one half, ten "
    "different answers do the work of a hundred. Flagged where the 95 % interval lies below one half.",
    remedy="Train with a lower learning rate or for more steps, give rows of rare answers a larger weight "
    "(data.train: {weight: ...}), and remove duplicate rows.",
)
VOCABULARY = Finding(
    "vocabulary",
    unit="times as many different pairs of words as in as many words of the references",
    threshold=0.5,
    why="Different texts are compared, with the same number of words of both, since longer texts always repeat more. "
    "Flagged below one half: where the references go on to a new pair, every second pair of the answers is a "
    "repetition.",
    remedy="If single answers repeat themselves, train with a lower learning rate or for fewer steps; if all answers "
    "use the same phrases, give more varied training answers.",
)
FORMAT = Finding(
    "format",
    unit="largest change of the share of answers that have a format, against the references",
    threshold=0.2,
    why="Formats are what a text begins with: JSON, a code fence, a heading, a list, a table, a tag, or prose. "
    "Flagged where the 95 % interval of the change lies above 20 %: one answer in five of another format breaks what "
    "reads them.",
    remedy="Look for rows of the other format among the training rows, and check that the chat template and the "
    "system prompt are those of the training.",
)

_FORMATS = {
    "empty": re.compile(r"\Z"),
    "JSON": re.compile(r"[{\[]"),
    "code fence": re.compile(r"```|~~~"),
    "heading": re.compile(r"#{1,6} "),
    "list": re.compile(r"([-*+•]|\d{1,3}[.)])\s"),
    "table": re.compile(r"\|"),
    "tag": re.compile(r"<[A-Za-z/!?]"),
}


def measure_style(
    answers: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
    cut: Sequence[bool],
    references_longer: Sequence[bool],
    seed: int = 0,
) -> list[Finding]:
    """How the answers are written, against the references to the same prompts; there is at least one. `cut`: whether
    each answer was stopped at max_new_tokens; `references_longer`: whether each reference has more tokens than that."""
    ours, theirs = mean(np.array(cut, float)), mean(np.array(references_longer, float))
    details = {"rows": len(cut), "answers cut": ours.value, "references longer": theirs.value}
    unfinished = UNFINISHED.difference(compare({"": theirs}, {"": ours}, seed)[""], details)
    texts = {"answers": answers, "references": references}
    return [_length(texts, seed), unfinished, _variety(texts, prompts, seed), _vocabulary(texts), _format(texts, seed)]


def _bootstrap(statistic: Callable[[np.ndarray], float], rows: int, seed: int) -> Interval | None:
    """The percentile interval of a statistic of row numbers, drawn with replacement."""
    fewest, most = _RESAMPLES
    drawn = np.random.default_rng(seed).integers(0, rows, (max(fewest, min(most, _DRAWN // rows)), rows))
    values = np.array([statistic(numbers) for numbers in drawn])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def _length(texts: Mapping[str, Sequence[str]], seed: int) -> Finding:
    """The ratio of medians, the larger over the smaller one."""
    ours, theirs = (np.array([len(split_words(text)) for text in of], float) for of in texts.values())
    details: dict[str, Any] = {"rows": len(ours)}
    if len(ours) < _FEWEST_ROWS or not np.median(theirs):
        return LENGTH.unmeasured("there are fewer than six answers, or references without words", details)
    for name, lengths in (("answers", ours), ("references", theirs)):
        marks = np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95])
        details[f"words of {name}"] = dict(zip(("5 %", "25 %", "median", "75 %", "95 %"), marks.tolist(), strict=True))

    def ratio_of_medians(rows: np.ndarray) -> float:
        # A median of no words counts as half a word, so that the ratio stays a number.
        return max(float(np.median(ours[rows])), 0.5) / max(float(np.median(theirs[rows])), 0.5)

    ratio = details["answers over references"] = ratio_of_medians(np.arange(len(ours)))
    interval = _bootstrap(ratio_of_medians, len(ours), seed)
    if ratio < 1 and interval:
        interval = Interval(1 / interval.high, 1 / interval.low, interval.method)
    flagged = interval is not None and interval.low > LENGTH.threshold
    return LENGTH.measured(max(ratio, 1 / ratio), flagged, interval, details)


def _variety(texts: Mapping[str, Sequence[str]], prompts: Sequence[str], seed: int) -> Finding:
    """The ratio of entropies over different prompts: the same prompt has the same greedy answer."""
    first = [*{normalize_words(prompt): row for row, prompt in reversed([*enumerate(prompts)])}.values()]
    details: dict[str, Any] = {"different prompts": len(first)}
    kinds = []
    for name, of_rows in texts.items():
        normalized = [normalize_words(of_rows[row]) for row in first]
        counts = Counter(normalized)
        details[f"different {name}"] = len(counts)
        frequent = [{"text": text, "share": count / len(first)} for text, count in counts.most_common(_SHOWN)]
        details[f"most frequent {name}"] = frequent
        kinds.append(np.unique(normalized, return_inverse=True)[1])
    ours, theirs = kinds
    if len(first) < _FEWEST_ROWS or not theirs.any():
        return VARIETY.unmeasured("there are fewer than six different prompts, or all references are the same", details)

    def ratio_of_entropies(rows: np.ndarray) -> float:
        below = _entropy(theirs[rows])
        return _entropy(ours[rows]) / below if below > 0 else float("nan")

    interval = _bootstrap(ratio_of_entropies, len(first), seed)
    flagged = interval is not None and interval.high < VARIETY.threshold
    return VARIETY.measured(ratio_of_entropies(np.arange(len(first))), flagged, interval, details)


def _entropy(kinds: np.ndarray) -> float:
    counts = np.bincount(kinds)
    shares = counts[counts > 0] / len(kinds)
    return float(shares @ np.log(1 / shares))


def _vocabulary(texts: Mapping[str, Sequence[str]]) -> Finding:
    # Each text once: how often it is given is the finding about variety.
    words = {name: [word for text in dict.fromkeys(of) for word in split_words(text)] for name, of in texts.items()}
    size = min(map(len, words.values()))
    details: dict[str, Any] = {"words compared": size}
    if size < _FEWEST_WORDS:
        return VOCABULARY.unmeasured(f"fewer than {_FEWEST_WORDS} words of answers and of references", details)
    for width in (1, 2, 3):
        runs = {name: [tuple(of[at : at + width]) for at in range(size - width + 1)] for name, of in words.items()}
        details[f"distinct-{width}"] = {name: len(set(of)) / len(of) for name, of in runs.items()}
    ratio = details["distinct-2"]["answers"] / details["distinct-2"]["references"]
    return VOCABULARY.measured(ratio, ratio < VOCABULARY.threshold, None, details)


def _format(texts: Mapping[str, Sequence[str]], seed: int) -> Finding:
    """The change of the format whose share changes most, paired over rows."""
    formats = {name: np.array([_format_of(text) for text in of]) for name, of in texts.items()}
    ours, theirs = formats.values()
    details: dict[str, Any] = {"rows": len(ours)}
    for name, of in texts.items():
        first_words = [next(iter(split_words(text[:200])), "") for text in of]
        details[f"formats of {name}"] = _shares(formats[name].tolist())
        details[f"first words of {name}"] = dict([*_shares(first_words).items()][:_SHOWN])
    changes = {name: (ours == name).mean() - (theirs == name).mean() for name in sorted({*ours, *theirs})}
    changed = max(changes, key=lambda name: abs(changes[name]))
    details["format"] = str(changed)
    before, after = (theirs, ours) if changes[changed] >= 0 else (ours, theirs)
    less, more = (mean((of_rows == changed).astype(float)) for of_rows in (before, after))
    return FORMAT.difference(compare({"": less}, {"": more}, seed)[""], details)


def _format_of(text: str) -> str:
    return next((name for name, pattern in _FORMATS.items() if pattern.match(text.lstrip())), "prose")


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in Counter(names).most_common()}
