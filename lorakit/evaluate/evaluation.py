"""An evaluation: what was asked for, and what came of it."""

from dataclasses import dataclass, field
from typing import Any

from lorakit.evaluate.comparison import Score
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.intervals import Comparison
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.results import ModelResult


@dataclass(frozen=True)
class EvalSettings:
    """How to score. `metrics` as the recipe has them; `rows`: from the first on, None is all; `seed` is that of the
    intervals; `cache`: what was computed before is taken from the cache, and what is computed is kept there."""

    metrics: tuple[Any, ...] = ()
    max_new_tokens: int = 64
    rows: int | None = None
    seed: int = 0
    cache: bool = True
    baseline: str | None = None


@dataclass(frozen=True)
class RowsUsed:
    """Which rows were scored: `count`, from the first on, of the `available` ones of `source`."""

    source: str
    count: int
    available: int
    answers: int

    def __str__(self) -> str:
        which = f"the first {self.count:,} of {self.available:,}" if self.count < self.available else f"{self.count:,}"
        return f"{which} rows: {self.source}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The subjects scored, in their order; each other one is compared with `baseline`."""

    models: list[ModelResult]
    baseline: ModelResult
    rows: RowsUsed
    settings: EvalSettings
    model_set: ModelSet
    scores: dict[str, dict[str, Score]]
    """By model and measure."""
    comparisons: dict[str, dict[str, Comparison]]
    """Of every other model with the baseline, by model and measure."""
    parts: dict[str, dict[str, dict[str, Score]]]
    """By task or source, model and measure."""
    part_comparisons: dict[str, dict[str, dict[str, Comparison]]]
    notes: list[str] = field(default_factory=list)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    """What may have gone wrong, by model; a leak stands under `data`."""

    @property
    def others(self) -> list[ModelResult]:
        """All models but the baseline."""
        return [model for model in self.models if model is not self.baseline]
