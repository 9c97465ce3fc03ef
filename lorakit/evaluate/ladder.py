"""The quality ladder: GGUF files of one run in falling size, each against full precision on the run's held-out rows.

The *share of quality kept* of a rung: of the loss it is exp(full - rung), the share of each trained token's probability
that is left, in the geometric mean over tokens; of a score of which more is better its value over that of full
precision, of one of which less is better the inverse. A score that is 0 at full precision, or of which neither more nor
less is better, has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.evaluate.gguf_source import GgufSource
from lorakit.evaluate.gguf_speed import GENERATED, Speed, measure_speeds
from lorakit.evaluate.metric import Comparison, Measure, Score
from lorakit.evaluate.models import ModelSet, gguf_model
from lorakit.evaluate.run import EvalSettings, Evaluation, score_models
from lorakit.model.llama_cpp import threads
from lorakit.prepare import GivenRows, Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run

UNMERGED = "base + adapter"
"""The column of the base in full precision with the adapter beside it, which the server applies."""
_PROMPT, _UNKNOWN_LIMIT = 256, 1024
# The exponential of the loss, which says nothing more.
_LEFT_OUT = ("perplexity",)


@dataclass(frozen=True)
class RungFile:
    """A rung as it was exported: its name, such as Q4_K_M, its file, and the share of its weights that fell back to
    another format than its type means."""

    name: str
    path: Path
    fallback_share: float

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class UnmergedFiles:
    """The base in full precision, the adapter as a GGUF LoRA, and the bytes of both."""

    base: Path
    adapter: Path
    bytes: int


@dataclass(frozen=True, eq=False)
class Ladder:
    """The rungs, the first in full precision; what each scores; and the speed of each by its name, and of the
    `unmerged` files where there are any. It was measured with a `prompt` of so many tokens, on so many `threads`."""

    rungs: tuple[RungFile, ...]
    evaluation: Evaluation
    speeds: dict[str, Speed]
    prompt: int
    threads: int
    unmerged: UnmergedFiles | None = None

    @property
    def full(self) -> RungFile:
        return self.rungs[0]

    @property
    def names(self) -> list[str]:
        """The names of the scores."""
        return list(self.scores(self.full.name))

    def scores(self, name: str) -> dict[str, Score]:
        """The scores of a rung."""
        scores = self.evaluation.parts[""].scores[name]
        return {score: one for score, one in scores.items() if score not in _LEFT_OUT}

    def comparisons(self, name: str) -> dict[str, Comparison]:
        """The scores of a rung against full precision."""
        compared = self.evaluation.parts[""].comparisons[name]
        return {score: one for score, one in compared.items() if score not in _LEFT_OUT}

    def quality(self, name: str) -> dict[str, float | None]:
        """The share of quality that a rung keeps, by score."""
        scores = self.scores(name)
        return {score: share_of_quality(one, scores[score].measure) for score, one in self.comparisons(name).items()}

    def gguf(self, name: str) -> GgufSource:
        gguf = next(model.spec.gguf for model in self.evaluation.models if model.name == name)
        assert gguf is not None
        return gguf


def share_of_quality(one: Comparison, measure: Measure) -> float | None:
    """The share of quality that a rung (the second) keeps of full precision (the first) in one score; None where that
    has no meaning."""
    if measure.unit == "nats":
        return math.exp(one.first - one.second)
    above, below = (one.second, one.first) if measure.higher else (one.first, one.second)
    if measure.higher is None or not below or math.isnan(above) or math.isnan(below):
        return None
    return above / below


def differing_scores(ladder: Ladder, name: str) -> list[str]:
    """The scores in which a rung can be told from full precision."""
    return [score for score, one in ladder.comparisons(name).items() if one.verdict != "cannot tell"]


def smallest_alike(ladder: Ladder) -> RungFile | None:
    """The smallest rung that no score tells from full precision; None if there is none."""
    alike = [rung for rung in ladder.rungs[1:] if not differing_scores(ladder, rung.name)]
    return min(alike, key=lambda rung: rung.bytes, default=None)


def score_ladder(
    run: Run,
    prepared: Prepared,
    rungs: Sequence[RungFile],
    settings: EvalSettings,
    progress: Progress,
    unmerged: UnmergedFiles | None = None,
    rows: GivenRows | None = None,
) -> Ladder:
    """Score the rungs of a run, the first in full precision, on its held-out rows or on others, and measure how fast
    each is."""
    given = {str(run.folder): (run, prepared)}
    specs = [replace(gguf_model(rung.name, str(rung.path), given, progress), prepared=prepared) for rung in rungs]
    model_set = ModelSet(tuple(specs), run, prepared, prepared.machine)
    evaluation = score_models(model_set, rows, replace(settings, baseline=rungs[0].name), progress)
    files: dict[str, tuple[Path, Path | None]] = {rung.name: (rung.path, None) for rung in rungs}
    if unmerged:
        files[UNMERGED] = (unmerged.base, unmerged.adapter)
    positions = specs[0].gguf.header.positions if specs[0].gguf else None
    prompt = _prompt(evaluation, min(_PROMPT, (positions.limit if positions else _UNKNOWN_LIMIT) - 2 * GENERATED))
    speeds = measure_speeds(files, prompt, threads(), progress)
    return Ladder(tuple(rungs), evaluation, speeds, len(prompt), threads(), unmerged)


def _prompt(evaluation: Evaluation, length: int) -> list[int]:
    """So many tokens of the rows, from the first again where all together have fewer."""
    tokens: list[int] = []
    while len(tokens) < max(length, 1):
        tokens += [token for row in evaluation.baseline.rendered.rows for token in row["input_ids"]]
    return tokens[: max(length, 1)]
