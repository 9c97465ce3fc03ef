"""How long the rows are, and what another `max_length`, batching or packing would make of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.data.batches import epoch_batches
from lorakit.data.example_arrays import TextLengths
from lorakit.data.packing import first_fit_decreasing

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BARS = 12
# Batches looked at for padding: enough for two digits.
_SAMPLED = 100_000


@dataclass(frozen=True)
class Limit:
    """What one `max_length` would do. Shares are of all texts, or of all trained tokens; times relative to no limit."""

    max_length: int
    over: int
    trained_with_drop: float
    trained_with_truncate: float
    time_with_drop: float
    time_with_truncate: float


@dataclass(frozen=True)
class Padding:
    """Tokens that batches compute for each token of a row: in the order of the file, batched by length, packed."""

    in_file_order: float
    by_length: float
    packed: float


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """The token counts below which 5, 25, 50, ... percent of the texts lie; `max` is the longest."""
    values = np.quantile(lengths, _QUANTILES, method="inverted_cdf")
    names = [f"p{round(share * 100)}" for share in _QUANTILES[:-1]] + ["max"]
    return dict(zip(names, map(int, values), strict=True))


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Bins of round widths: their first and last token count, and how many texts lie within. Few long ones share the
    last bin."""
    top = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    least = max(1, -(-top // _BARS))
    unit = 10 ** (len(str(least)) - 1)
    width = next(step * unit for step in (1, 2, 5, 10) if step * unit >= least)
    edges = [*range((int(lengths.min()) - 1) // width * width, top + width, width)]
    counts, _ = np.histogram(lengths, bins=[edge + 0.5 for edge in edges])
    bins = [(start + 1, start + width, int(count)) for start, count in zip(edges[:-1], counts, strict=True)]
    beyond = int((lengths > edges[-1]).sum())
    return [*bins, (edges[-1] + 1, int(lengths.max()), beyond)] if beyond else bins


def limits(texts: TextLengths, current: int, attention_at: float) -> list[Limit]:
    """What each of several values of `max_length` would do to the texts, the current one among them.

    `attention_at`: the length in tokens at which attention costs as much as all matrix products together.
    """
    longest = int(texts.length.max())
    powers = [1 << power for power in range(5, 21) if texts.length.min() < 1 << power < 2 * longest]
    owner = np.repeat(np.arange(len(texts.length)), texts.turns)
    without_turns = texts.turns == 0
    all_trained, all_time = max(int(texts.trained.sum()), 1), _time(texts.length, attention_at)
    limits = []
    for limit in sorted({*powers[-6:], current}):
        whole, within = texts.length <= limit, texts.ends <= limit
        length, trained = np.zeros_like(texts.length), np.zeros_like(texts.length)
        np.maximum.at(length, owner[within], texts.ends[within])
        np.maximum.at(trained, owner[within], texts.trained_by_end[within])
        length[without_turns], trained[without_turns] = limit, np.minimum(limit, texts.trained[without_turns])
        length, trained = np.where(whole, texts.length, length), np.where(whole, texts.trained, trained)
        limits.append(
            Limit(
                limit,
                over=int((~whole).sum()),
                trained_with_drop=float(texts.trained[whole].sum()) / all_trained,
                trained_with_truncate=float(trained.sum()) / all_trained,
                time_with_drop=_time(texts.length[whole], attention_at) / all_time,
                time_with_truncate=_time(length, attention_at) / all_time,
            )
        )
    return limits


def _time(lengths: np.ndarray, attention_at: float) -> float:
    """The cost of texts in token units: attention grows with the length, the rest does not."""
    return float((lengths * (1 + lengths / attention_at)).sum())


def padding(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> Padding:
    """What padding costs when whole steps are computed at once; of very many rows, of a random sample."""
    lengths = np.asarray(lengths)
    if len(lengths) > _SAMPLED:
        lengths = np.random.default_rng(seed).choice(lengths, _SAMPLED, replace=False)
    longest, total = int(lengths.max()), int(lengths.sum())
    arrival = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    batches = [lengths[rows] for rows in epoch_batches(lengths.tolist(), batch_size, seed, 0)]
    packed = 0
    for batch in batches:
        packs = first_fit_decreasing(batch.tolist(), longest)
        packed += len(packs) * max(int(batch[pack].sum()) for pack in packs)
    return Padding(
        sum(int(batch.max()) * len(batch) for batch in arrival) / total,
        sum(int(batch.max()) * len(batch) for batch in batches) / total,
        packed / total,
    )
