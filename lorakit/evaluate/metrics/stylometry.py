"""Metrics of style: how something is said, whatever it says."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorakit.evaluate.metrics.matching import tokens
from lorakit.registry import METRICS

# Burrows took the 150 most frequent words of long texts. Held-out answers have some thousand words in all: of so few,
# these are mostly function words, and a word that stands in fewer than this share of them is one of the subject.
_WORDS, _IN_SHARE = 50, 0.05
# A square is the mean product of two different parts of the rows: in the square of one mean, what differs by chance
# would add up, and more so in every resample, so that an interval would lie above its value.
_PARTS = 5


def _pooled_delta(sums: Any) -> Any:
    """Delta of summed statistics (..., parts + words x (parts + 2)): the rows of each part; then for each word how much
    larger its share of an answer's words is than of the reference's, summed over the rows of each part, and its share
    of a reference's words, and this squared, over all rows."""
    import numpy as np

    rows = sums[..., :_PARTS]
    by_word = sums[..., _PARTS:].reshape(*sums.shape[:-1], -1, _PARTS + 2)
    means = by_word[..., :_PARTS] / np.maximum(rows, 1)[..., None, :]
    parts = (rows > 0).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = (means.sum(-1) ** 2 - (means**2).sum(-1)) / (parts * (parts - 1))
        shares = by_word[..., _PARTS:] / rows.sum(-1)[..., None, None]
        variances = shares[..., 1] - shares[..., 0] ** 2
        varies = variances > 1e-12
        delta = np.where(varies, squares / variances, 0).sum(-1) / varies.sum(-1)
        return np.sign(delta) * np.sqrt(np.abs(delta))


@METRICS.register("burrows-delta", unit="ratio", higher=False, batched=True, pool=_pooled_delta)
def burrows_delta(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, Any]]:
    """Burrows's Delta: how far the answers' use of the references' commonest words is from theirs; 0 is the same.

    Of the 50 most frequent words (of those in one of twenty references or more): the difference of a word's mean share
    in answers and in references, in standard deviations of its share in one reference; the root of the mean square over
    words (J. Burrows, Literary and Linguistic Computing 17:267, 2002, in the quadratic form of S. Argamon, 23:131,
    2008). Such words are hardly chosen by subject, so they tell one author from another. Squares are of parts of the
    rows that know nothing of each other, so that chance adds nothing: near 0 a Delta may be a little below 0.
    """
    given, wanted = ([_shares(text) for text in texts] for texts in (answers, references))
    total, rows_with = Counter[str](), Counter(word for row in wanted for word in row)
    for text in references:
        total.update(tokens(text))
    common = [word for word in total if rows_with[word] >= _IN_SHARE * len(references)]
    frequent = sorted(common, key=lambda word: (-total[word], word))[:_WORDS]
    if not frequent:
        return [{} for _ in answers]
    rows = []
    for number, (ours, theirs) in enumerate(zip(given, wanted, strict=True)):
        part = [float(number % _PARTS == one) for one in range(_PARTS)]
        statistics = [*part]
        for word in frequent:
            more, share = ours.get(word, 0.0) - theirs.get(word, 0.0), theirs.get(word, 0.0)
            statistics += [*(is_in * more for is_in in part), share, share**2]
        rows.append({"": tuple(statistics)})
    return rows


def _shares(text: str) -> dict[str, float]:
    """Each word's share of a text's words."""
    counts = Counter(tokens(text))
    return {word: count / counts.total() for word, count in counts.items()}
