"""A measure: one number about many rows, kept as what each row adds to it.

Every score is a function of sums over rows: a mean (values, rows that have one), a loss (nats, tokens), corpus BLEU
(its n-gram counts). Kept so, it can be taken again over any choice of rows, which is what intervals stand on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorakit.amounts import percent
from lorakit.registry import Unit

UNITS: dict[str, str] = {
    "share": "{:.1%}",
    "points": "{:.1f}",
    "ratio": "{:.3f}",
    "nats": "{:.4f}",
    "perplexity": "{:.4g}",
}
"""How a value of each unit is written: shares of 1 as per cent, points of 100 as they are."""


@dataclass(frozen=True, eq=False)
class Measure:
    """What each row adds to one number.

    `rows` (rows, statistics) holds zeros for a row that has none; `pool` makes the number of their sums, for an array
    (..., statistics) an array (...), NaN where it has none. `higher`: whether more is better; None where neither is.
    """

    rows: np.ndarray
    pool: Callable[[np.ndarray], np.ndarray]
    unit: Unit = "share"
    higher: bool | None = True

    @property
    def value(self) -> float:
        """The number over all rows; NaN where no row has any."""
        return float(self.pool(self.rows.sum(0)))

    @property
    def by_row(self) -> np.ndarray:
        """The number of each row alone (rows,), NaN where it has none."""
        return self.pool(self.rows)

    def write(self, value: float) -> str:
        """A value of this measure as a table shows it."""
        if self.unit == "share" and not np.isnan(value):
            return percent(value, 1)
        return "-" if np.isnan(value) else UNITS[self.unit].format(value)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over second, NaN where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def mean(values: np.ndarray, unit: Unit = "share", higher: bool | None = True) -> Measure:
    """The mean of one value a row (rows,); a row with NaN has none and is left out."""
    there = ~np.isnan(values)
    return Measure(np.stack([np.where(there, values, 0.0), there.astype(float)], axis=1), ratio, unit, higher)


def loss(nats: np.ndarray, tokens: np.ndarray) -> Measure:
    """Mean cross-entropy a token, from each row's summed nats (rows,) and trained tokens (rows,): a ratio of sums."""
    return Measure(np.stack([nats, tokens], axis=1).astype(float), ratio, "nats", higher=False)


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Measure:
    """The exponential of `loss`, cut off at exp(700) as lorakit's tables have it."""

    def pool(sums: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(ratio(sums), 700.0))

    return Measure(np.stack([nats, tokens], axis=1).astype(float), pool, "perplexity", higher=False)
