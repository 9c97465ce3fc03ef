"""Checks of a whole set, over the stats of its rows: duplicates, contradictions, outliers of style, leakage. Each takes
arrays with one entry a row and gives numbers of rows, with reasons where they differ by row."""

from dataclasses import dataclass

import numpy as np

from lorakit.data.cleaning.row_stats import FEATURES, SCRIPTS, RowStats, languages

FEWEST = 50  # rows below which nothing is called unusual
_MAJORITY = 0.95  # share of the rows that one language or script must have for another to be unusual
_RARE = 0.02  # what more rows than this have in common (and more than three) is a habit of the set, not an outlier
_FAR = 6.0  # robust standard deviations from the median
# The least spread of the logarithms of counts: with a gap of 0.7 to all others, a length is different only beyond
# 4.5 times the median and twice all others. The least spread of shares, whose gap is 0.1.
_COUNTS = {"characters": 0.25, "words": 0.25, "line breaks": 0.35}
_SHARES = {"upper case": 0.04, "punctuation": 0.03, "digits": 0.03, "informal marks": 0.03}


@dataclass(frozen=True)
class Leak:
    """A training row that a held-out set has too."""

    row: int
    held_out: int
    reason: str


def duplicates(content: np.ndarray) -> np.ndarray:
    """The first row with exactly the same content: int32 [n], its own for a first one. `content`: uint64 [n, 2]."""
    order = np.lexsort((content[:, 1], content[:, 0]))  # stable: equal rows stay in their order
    ordered = content[order]
    starts = np.ones(len(content), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.empty(len(content), np.int32)
    first[order] = order[starts][np.cumsum(starts) - 1] if len(content) else []
    return first


def contradictions(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal prompts with different answers, both uint64 [n]: for each row the first row with its prompt (int32 [n], -1
    without a contradiction), and whether a fix keeps the row (bool [n]): it has none, or the answer that most rows of
    its group give. In a tie the whole group goes. Rows without a prompt (0) contradict nothing."""
    count = len(prompt)
    first = duplicates(np.stack([prompt, np.zeros_like(prompt)], 1))
    first_alike = duplicates(np.stack([prompt, answer], 1))
    answers = np.flatnonzero(first_alike == np.arange(count))  # one row for each distinct answer to a prompt
    votes = np.bincount(first_alike, minlength=count)
    most = np.zeros(count, np.int64)
    np.maximum.at(most, first[answers], votes[answers])
    winners = np.bincount(first[answers][votes[answers] == most[first[answers]]], minlength=count)
    disputed = (np.bincount(first[answers], minlength=count)[first] > 1) & (prompt != 0)
    wins = (votes[first_alike] == most[first]) & (winners[first] == 1)
    return np.where(disputed, first, -1), ~disputed | wins


def outliers(stats: RowStats) -> dict[int, str]:
    """Rows whose answer differs from nearly all others, each with the reason: in a measure, by 6 robust standard
    deviations (median absolute deviation) and well beyond what 98 % have, where at most 2 % do so; in its language or
    script, where over 95 % share another. Nothing is unusual among fewer than 50 rows."""
    assert stats.style is not None and stats.language is not None and stats.script is not None
    reasons: dict[int, list[str]] = {}
    for column, name in enumerate(FEATURES):
        for row, reason in _far_rows(name, stats.style[:, column]):
            if not (name == "words" and row in reasons):  # the length in words adds nothing
                reasons.setdefault(row, []).append(reason)
    for row, reason in _minority(stats.script, "answer in {} script where {:.0%} are in {}", SCRIPTS):
        reasons.setdefault(row, []).append(reason)
    names = languages() if (stats.language >= 0).any() else ()  # the names cost the model's loading
    for row, reason in _minority(stats.language, "answer in language {} where {:.0%} are in {}", names):
        reasons.setdefault(row, [reason])  # another script, or a text that is hardly one, makes the language a guess
    return {row: "; ".join(reasons[row]) for row in sorted(reasons)}


def _far_rows(name: str, values: np.ndarray) -> list[tuple[int, str]]:
    """The rows far from the median of one measure, with their value and those of the others."""
    rows = np.flatnonzero(~np.isnan(values))
    if len(rows) < FEWEST:
        return []
    is_count = name in _COUNTS
    least_spread, gap = (_COUNTS[name], 0.7) if is_count else (_SHARES[name], 0.1)
    scaled = np.log1p(values[rows]) if is_count else values[rows]
    middle = np.median(scaled)
    spread = max(1.4826 * float(np.median(np.abs(scaled - middle))), least_spread)
    far = np.abs(scaled - middle) > _FAR * spread
    if not far.any():
        return []
    low, high = np.percentile(scaled[~far], (1, 99)).tolist()
    far &= (scaled < low - gap) | (scaled > high + gap)
    outlying = []
    for side in (scaled < middle, scaled > middle):
        places = np.flatnonzero(far & side)
        if len(places) <= max(3, _RARE * len(rows)):
            outlying += [(int(row), _reason(name, values[row], low, high)) for row in rows[places]]
    return outlying


def _reason(name: str, value: float, low: float, high: float) -> str:
    if name in _COUNTS:
        others = dict.fromkeys(f"{round(np.expm1(end)):,}" for end in (low, high))
        return f"answer of {value:,.0f} {name} where 98 % have {' to '.join(others)}"
    unit = {"upper case": "letters", "informal marks": "words"}.get(name, "characters")
    others = dict.fromkeys(f"{max(0.0, end):.0%}" for end in (low, high))
    return f"{name} in {value:.0%} of the {unit} of the answer where 98 % have {' to '.join(others)}"


def _minority(values: np.ndarray, template: str, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """The rows that have another value than the one that nearly all rows share; -1 is unknown."""
    rows = np.flatnonzero(values >= 0)
    counts = np.bincount(values[rows], minlength=1)
    main = int(counts.argmax())
    share = counts[main] / max(len(rows), 1)
    if len(rows) < FEWEST or share <= _MAJORITY:
        return []
    others = rows[values[rows] != main]
    return [(int(row), template.format(names[values[row]], min(share, 0.99), names[main])) for row in others]


def leaks(train: RowStats, held_out: RowStats) -> list[Leak]:
    """Training rows with exactly the content, or with the prompt and the answer, of a held-out row; in their order.
    White space and case do not tell prompts or answers apart, nor does what is not trained on."""
    exact = _matches(train.content, held_out.content)
    ours, theirs = (np.stack([stats.prompt, stats.answer], 1) for stats in (train, held_out))
    same = np.where(train.prompt != 0, _matches(ours, theirs), -1)
    whole, parts = "the same as a held-out row", "the prompt and the answer of a held-out row"
    rows = np.flatnonzero((exact >= 0) | (same >= 0)).tolist()
    return [Leak(row, *((int(exact[row]), whole) if exact[row] >= 0 else (int(same[row]), parts))) for row in rows]


def _matches(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of our pairs (uint64 [n, 2]) the first of theirs that is equal, or -1: int64 [n]."""
    both = np.concatenate([theirs, ours])
    first = duplicates(both)[len(theirs) :]
    return np.where(first < len(theirs), first, -1).astype(np.int64)
