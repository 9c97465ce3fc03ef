"""Metrics of style: how something is said, whatever it says."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorakit.evaluate.metrics.matching import tokens
from lorakit.registry import METRICS

# Burrows took the 150 most frequent words of long texts. Held-out answers have some thousand words in all: of so few,
# these are mostly function words, and a word that stands in fewer than this share of them is one of the subject.
_WORDS, _IN_SHARE = 50, 0.05


def _pooled_delta(sums: Any) -> Any:
    """Burrows's Delta of summed statistics (..., 3 + 4 x words): words in answers, words in references, rows; then for
    each word its count in answers, in references, its share of a reference's words, and this share squared."""
    import numpy as np

    lengths, rows, by_word = sums[..., :2], sums[..., 2:3], sums[..., 3:]
    counts = np.stack([by_word[..., 0::4], by_word[..., 1::4]], axis=-2)
    given, wanted = np.moveaxis(counts / np.maximum(lengths, 1)[..., None], -2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = by_word[..., 3::4] / rows - (by_word[..., 2::4] / rows) ** 2
        varies = variance > 1e-12
        distances = np.where(varies, np.abs(given - wanted) / np.sqrt(np.where(varies, variance, 1)), 0)
        return np.where(varies.any(-1), distances.sum(-1) / varies.sum(-1), np.nan)


@METRICS.register("burrows-delta", unit="ratio", higher=False, batched=True, pool=_pooled_delta)
def burrows_delta(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, Any]]:
    """Burrows's Delta: how far the answers' use of the references' commonest words is from theirs; 0 is the same.

    The mean, over the 50 most frequent words (of those in one of twenty references or more), of the distance of a
    word's frequency in all answers from that in all references, in standard deviations of its frequency in a single
    reference (J. Burrows, Literary and Linguistic Computing 17:267, 2002). Such words are hardly chosen by subject, so
    they tell one author from another.
    """
    given, wanted = ([Counter(tokens(text)) for text in texts] for texts in (answers, references))
    total, rows_with = sum(wanted, Counter()), Counter(word for row in wanted for word in row)
    common = [word for word in total if rows_with[word] >= _IN_SHARE * len(references)]
    frequent = sorted(common, key=lambda word: (-total[word], word))[:_WORDS]
    if not frequent:
        return [{} for _ in answers]
    rows = []
    for ours, theirs in zip(given, wanted, strict=True):
        statistics = [float(ours.total()), float(theirs.total()), 1.0]
        for word in frequent:
            share = theirs[word] / max(theirs.total(), 1)
            statistics += [ours[word], theirs[word], share, share**2]
        rows.append({"": tuple(statistics)})
    return rows
