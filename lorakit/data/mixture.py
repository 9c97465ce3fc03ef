"""The mixture: how often the examples of each source are drawn, epoch by epoch."""

import math
from dataclasses import dataclass

from lorakit.errors import UserError
from lorakit.recipe.schema import Train

_MOST_DRAWN = 1 << 28  # an epoch's order is held in memory, some 40 bytes a row


@dataclass(frozen=True)
class Mixture:
    """How many examples each source has, and its weight: how often each of them is drawn in an epoch on average. What
    an epoch rounds off goes into the next one: E epochs draw w x E x n examples of a source of n, rounded once."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_weighted(self) -> bool:
        """Whether some source's rows are not drawn exactly once an epoch."""
        return any(weight != 1 for weight in self.weights)

    @property
    def per_epoch(self) -> float:
        """Examples of an epoch on average."""
        return sum(weight * count for weight, count in zip(self.weights, self.counts, strict=True))

    def drawn_by(self, epochs: int) -> list[int]:
        """How many examples of each source the first `epochs` epochs draw."""
        pairs = zip(self.weights, self.counts, strict=True)
        return [math.floor(epochs * weight * count + 0.5) for weight, count in pairs]

    def drawn_in(self, epoch: int) -> list[int]:
        """How many examples of each source one epoch draws; the first is 0."""
        return [after - before for before, after in zip(self.drawn_by(epoch), self.drawn_by(epoch + 1), strict=True)]

    def steps_in(self, epoch: int, batch_size: int) -> int:
        """The batches of one epoch, the last of which may be smaller."""
        return -(-sum(self.drawn_in(epoch)) // batch_size)

    def run_steps(self, batch_size: int, epochs: float | None, steps: int | None) -> int:
        """The steps of a run: those it is given, or those of its epochs, of a part of one so many that it is
        reached."""
        if steps:
            return steps
        whole, part = divmod(epochs or 1, 1)
        if self.is_weighted:
            before = sum(self.steps_in(epoch, batch_size) for epoch in range(int(whole)))
        else:
            before = int(whole) * self.steps_in(0, batch_size)
        return max(1, before + math.ceil(part * self.steps_in(int(whole), batch_size)))

    def refuse_extremes(self) -> None:
        """A `UserError` for weights that leave an epoch without a row, or with more than its order can be held of."""
        drawn = self.per_epoch
        if drawn >= 1 and (drawn <= _MOST_DRAWN or not self.is_weighted):
            return
        bound = "less than one. Write larger ones, or give more rows"
        if drawn >= 1:
            bound = f"more than {_MOST_DRAWN:,}. Write smaller ones"
        raise UserError(f"data.train: with these weights an epoch draws {drawn:.2g} rows, {bound}.")


def rows_per_step(train: Train, mean: float) -> int:
    """The rows of a step whose tokens the recipe gives, where a row has `mean` tokens; else its `batch_size`."""
    return train.batch_size if train.batch_tokens is None else max(1, round(train.batch_tokens / max(mean, 1)))
