"""How often the rows of each source are drawn, in words."""

from dataclasses import dataclass

from lorakit.data.batches import draws
from lorakit.data.dataset import Examples
from lorakit.data.report import SourceReport
from lorakit.recipe.schema import Train

# Epochs up to which each is told.
_TOLD = 8


@dataclass(frozen=True)
class SourceDraws:
    """The draws of one source: its examples, and how many of them each epoch of the run draws."""

    source: SourceReport
    rows: int
    epochs: list[int]

    @property
    def total(self) -> int:
        return sum(self.epochs)

    def __str__(self) -> str:
        each = ", ".join(f"{number:,}" for number in self.epochs)
        if len(self.epochs) > _TOLD:
            each = f"{min(self.epochs):,} to {max(self.epochs):,}"
        epochs = "the one epoch" if len(self.epochs) == 1 else f"{len(self.epochs)} epochs"
        return (
            f"{self.source.path}: weight {self.source.weight:g}: of {self.rows:,} rows {each} drawn in {epochs} of the "
            f"run, {self.total:,} in total"
        )

    @property
    def warning(self) -> str | None:
        """What to say of a source that is not trained at all; None where it is."""
        if self.total:
            return None
        if not self.rows:
            return f"{self.source.path}: no row is trained: none is left of it"
        return (
            f"{self.source.path}: no row is trained: weight {self.source.weight:g} draws none of its {self.rows:,} "
            "rows in this run. Raise its weight, or train longer"
        )


def count_draws(train: Examples, settings: Train) -> list[SourceDraws]:
    """What a run draws of each source."""
    mixture = train.mixture
    steps = mixture.run_steps(settings.batch_size, settings.epochs, settings.steps)
    epochs = draws(train.lengths().tolist(), settings.batch_size, settings.seed, mixture, steps)
    sources = train.report.sources
    return [
        SourceDraws(source, rows, [epoch[number] for epoch in epochs])
        for number, (source, rows) in enumerate(zip(sources, mixture.counts, strict=True))
    ]
