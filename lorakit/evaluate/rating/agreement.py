"""How far raters agree: Krippendorff's alpha, and the share of equal ratings."""

import numpy as np


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Krippendorff's alpha for ordinal ratings: 1 where raters agree, 0 where they agree as by chance, below 0 less.

    `ratings`: (raters, units), NaN where a rater gave none. Units that fewer than two rated do not count. NaN where
    alpha is not defined: nobody rated what another did, or all those ratings are one value.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), with the ordinal metric difference.
    """
    counts = _counts(ratings)
    raters = counts.sum(axis=1, keepdims=True)
    coincidences = (counts.T @ (counts / (raters - 1))) - np.diag((counts / (raters - 1)).sum(axis=0))
    margin = coincidences.sum(axis=1)
    below = np.cumsum(margin) - margin / 2
    distance = (below[:, None] - below[None, :]) ** 2
    expected = float(margin @ distance @ margin)
    if expected == 0:
        return float("nan")
    return 1 - (float(margin.sum()) - 1) * float((coincidences * distance).sum()) / expected


def equal_share(ratings: np.ndarray) -> float:
    """Of all pairs of ratings by two raters of one unit, the share that are equal; NaN where there are none.

    `ratings` as for `krippendorff_alpha`.
    """
    counts = _counts(ratings)
    raters = counts.sum(axis=1)
    pairs = float((raters * (raters - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else float("nan")


def _counts(ratings: np.ndarray) -> np.ndarray:
    """(units with two ratings or more, values in their order): how many raters gave that value."""
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(axis=0).astype(float)
    pairable: np.ndarray = counts[counts.sum(axis=1) >= 2]
    return pairable
