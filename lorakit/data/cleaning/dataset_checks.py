"""Checks of a whole set, over the traits of its rows: duplicates, contradictions, outliers of style, leakage.

Each takes arrays with one entry a row and gives places of rows, with reasons in words where they differ by row.
"""

from dataclasses import dataclass

import numpy as np

from lorakit.data.cleaning.row_stats import RowStats
from lorakit.data.cleaning.style import FEATURES, SCRIPTS, languages

FEWEST = 50
"""Rows below which nothing is called unusual."""
_MOST = 0.95
"""Share of the rows that one language or script must have for another to be unusual."""
_RARE = 0.02
"""What more rows than this have in common (and more than three) is a habit of the set, not an outlier."""
_FAR = 6.0
"""Robust standard deviations from the median."""


@dataclass(frozen=True)
class _Measure:
    """How a feature is compared: whether on a logarithmic scale, the least spread, and the least gap to the others."""

    log: bool
    spread: float
    gap: float


# Spread and gap of logarithms: a length counts as different only beyond 4.5 times the median and twice all others.
_MEASURES = {
    "characters": _Measure(True, 0.25, 0.7),
    "words": _Measure(True, 0.25, 0.7),
    "line breaks": _Measure(True, 0.35, 0.7),
    "upper case": _Measure(False, 0.04, 0.1),
    "punctuation": _Measure(False, 0.03, 0.1),
    "digits": _Measure(False, 0.03, 0.1),
    "informal marks": _Measure(False, 0.03, 0.1),
}


def duplicates(said: np.ndarray) -> np.ndarray:
    """The first row that says exactly the same: int32 [n], its own place for a first one. `said`: uint64 [n, 2]."""
    order = np.lexsort((said[:, 1], said[:, 0]))  # stable: equal rows stay in their order
    ordered = said[order]
    starts = np.ones(len(said), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.empty(len(said), np.int32)
    first[order] = order[starts][np.cumsum(starts) - 1] if len(said) else []
    return first


@dataclass(frozen=True)
class Contradictions:
    """Rows whose prompt has several answers.

    `group` int32 [n]: the first row with this prompt, -1 for a row without contradiction. `kept` bool [n]: what a fix
    keeps: the rows without contradiction, and those with the answer that most rows of their group give; where two
    answers are given equally often, none of the group.
    """

    group: np.ndarray
    agrees: np.ndarray


def contradictions(prompt: np.ndarray, answer: np.ndarray) -> Contradictions:
    """Finds equal prompts with different answers; rows without a prompt (0) contradict nothing. Both uint64 [n]."""
    group = np.full(len(prompt), -1, np.int32)
    kept = np.ones(len(prompt), bool)
    order = np.lexsort((answer, prompt))
    order = order[prompt[order] != 0]
    if not len(order):
        return Contradictions(group, kept)
    prompts, answers = prompt[order], answer[order]
    new_prompt = np.concatenate([[True], prompts[1:] != prompts[:-1]])
    new_answer = new_prompt | np.concatenate([[True], answers[1:] != answers[:-1]])
    starts = np.flatnonzero(new_answer)
    votes = np.diff(np.append(starts, len(order)))
    of_prompt = np.cumsum(new_prompt[starts]) - 1  # the prompt of each distinct answer
    first_answer = np.flatnonzero(new_prompt[starts])
    distinct = np.diff(np.append(first_answer, len(starts)))
    most = np.maximum.reduceat(votes, first_answer)
    winners = np.add.reduceat((votes == most[of_prompt]).astype(np.int64), first_answer)
    wins = (votes == most[of_prompt]) & (winners[of_prompt] == 1)
    row_prompt = np.cumsum(new_prompt) - 1
    disputed = (distinct > 1)[row_prompt]
    firsts = np.minimum.reduceat(order, np.flatnonzero(new_prompt))
    group[order[disputed]] = firsts[row_prompt][disputed]
    kept[order[disputed]] = wins[np.cumsum(new_answer) - 1][disputed]
    return Contradictions(group, kept)


@dataclass(frozen=True)
class Outlier:
    """A row that is written unlike the others, and in what."""

    row: int
    reason: str


def outliers(traits: RowStats) -> list[Outlier]:
    """Rows whose answer differs from nearly all others in length, characters, script or language, in their order.

    Nothing is unusual among fewer than 50 rows. A row differs in a measure when it is 6 robust standard deviations
    from the median (median absolute deviation), well beyond what 98 % of the others have, and at most 2 % of the rows
    do so; in its language or script when over 95 % of the rows share another.
    """
    if traits.style is None or traits.language is None or traits.script is None:
        raise ValueError("these traits have no measures of style")
    reasons: dict[int, list[str]] = {}
    for column, name in enumerate(FEATURES):
        for row, reason in _far(name, traits.style[:, column]):
            if not (name == "words" and row in reasons):  # the length in words says nothing new
                reasons.setdefault(row, []).append(reason)
    for row, reason in _minority(traits.script, "answer in {} script where {:.0%} are in {}", SCRIPTS):
        reasons.setdefault(row, []).append(reason)
    names = languages() if (traits.language >= 0).any() else ()  # the names cost the model's loading
    for row, reason in _minority(traits.language, "answer in language {} where {:.0%} are in {}", names):
        if row not in reasons:  # another script, or a text that is hardly one, makes the language a guess
            reasons[row] = [reason]
    return [Outlier(row, "; ".join(reasons[row])) for row in sorted(reasons)]


def _far(name: str, values: np.ndarray) -> list[tuple[int, str]]:
    """The rows far from the median of one measure, with what they have and what the others have."""
    rows = np.flatnonzero(~np.isnan(values))
    if len(rows) < FEWEST:
        return []
    measure = _MEASURES[name]
    scaled = np.log1p(values[rows]) if measure.log else values[rows]
    middle = np.median(scaled)
    spread = max(1.4826 * float(np.median(np.abs(scaled - middle))), measure.spread)
    far = np.abs(scaled - middle) > _FAR * spread
    if not far.any():
        return []
    low, high = np.percentile(scaled[~far], (1, 99))
    far &= (scaled < low - measure.gap) | (scaled > high + measure.gap)
    found = []
    for side in (scaled < middle, scaled > middle):
        places = np.flatnonzero(far & side)
        if len(places) <= max(3, _RARE * len(rows)):
            found += [
                (int(rows[at]), _words(name, values[rows[at]], measure, float(low), float(high))) for at in places
            ]
    return found


def _words(name: str, value: float, measure: _Measure, low: float, high: float) -> str:
    if measure.log:
        few, many = round(np.expm1(low)), round(np.expm1(high))
        others = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        return f"answer of {value:,.0f} {name} where 98 % have {others}"
    of = {"upper case": "letters", "informal marks": "words"}.get(name, "characters")
    few, many = max(0.0, low), max(0.0, high)
    others = f"{few:.0%}" if f"{few:.0%}" == f"{many:.0%}" else f"{few:.0%} to {many:.0%}"
    return f"{name} in {value:.0%} of the {of} of the answer where 98 % have {others}"


def _minority(values: np.ndarray, words: str, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """The rows that have another value than the one that nearly all rows share; -1 is unknown."""
    rows = np.flatnonzero(values >= 0)
    if len(rows) < FEWEST:
        return []
    counts = np.bincount(values[rows])
    main = int(counts.argmax())
    share = counts[main] / len(rows)
    if share <= _MOST:
        return []
    others = rows[values[rows] != main]
    return [(int(row), words.format(names[values[row]], min(share, 0.99), names[main])) for row in others]


@dataclass(frozen=True)
class Leak:
    """A training row that a held-out set has too."""

    row: int
    held_out: int
    reason: str


def leaks(train: RowStats, held_out: RowStats) -> list[Leak]:
    """Training rows that say exactly what a held-out row says, or that give its prompt the same answer; in their order.

    White space and case do not tell prompts or answers apart, nor does what is not trained on.
    """
    exact = _matches(train.content, held_out.content)
    asked = (train.prompt != 0)[:, None]
    ours = np.where(asked, np.stack([train.prompt, train.answer], 1), 0)
    theirs = np.stack([held_out.prompt, held_out.answer], 1)
    same = np.where(train.prompt != 0, _matches(ours, theirs), -1)
    found = []
    for row in np.flatnonzero((exact >= 0) | (same >= 0)).tolist():
        if exact[row] >= 0:
            found.append(Leak(row, int(exact[row]), "the same as a held-out row"))
        else:
            found.append(Leak(row, int(same[row]), "the prompt and the answer of a held-out row"))
    return found


def _matches(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of our pairs (uint64 [n, 2]) the first of theirs that is equal, or -1: int64 [n]."""
    both = np.concatenate([theirs, ours])
    first = duplicates(both)[len(theirs) :]
    return np.where(first < len(theirs), first, -1).astype(np.int64)
