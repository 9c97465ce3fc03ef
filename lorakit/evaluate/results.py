"""The results of an evaluation: each model's measures on the rows, and the comparisons with the baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lorakit.evaluate.classification import Labels, LabelScores, score_labels
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.generate import decode_answer
from lorakit.evaluate.inference import EvalModel, compute_likelihoods, compute_losses, generate_answers
from lorakit.evaluate.likelihood import trained_tokens
from lorakit.evaluate.metric import Comparison, Measure, Score, compare, intervals, loss, perplexity, row_scores
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import RenderedRows

Groups = dict[str, dict[str, Measure]]
"""Measures by what they are taken on; those of one group hold the same rows: `rows`, `answers`, and `labels` of a
task."""
# Two models share these only if their tokenizers cut the rows alike.
_PER_TOKEN = ("loss", "perplexity")


@dataclass(frozen=True)
class EvalSettings:
    """How to score. `metrics` as the recipe has them; `rows`: only the first ones, None is all; `seed` is for the
    intervals; `cache`: read what was computed before, and write what is computed."""

    metrics: tuple[Any, ...] = ()
    max_new_tokens: int = 64
    rows: int | None = None
    seed: int = 0
    cache: bool = True
    baseline: str | None = None


@dataclass(frozen=True, eq=False)
class ModelResult:
    """What one model computed on the rows, and the measures of it. `nats` (rows,): the loss summed over each row's
    trained `tokens` (rows,). `answers` to the prompts of `rendered`, none if no metric needs them, and whether the
    model `ended` each. `likelihoods` (rows of the task, labels), in nats, by the task's tag. `measures` of all rows
    ("") and of the rows of one task, or of one source, alone. `examined`: what else was measured while the model was in
    memory."""

    spec: EvalModelSpec
    rendered: RenderedRows
    nats: np.ndarray
    tokens: np.ndarray
    answers: list[str]
    ended: list[bool]
    likelihoods: dict[str, np.ndarray]
    classifications: dict[str, LabelScores]
    measures: dict[str, Groups]
    examined: Any

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def scores(self) -> dict[str, float]:
        """Each measure's value over all rows."""
        return {name: measure.value for group in self.measures[""].values() for name, measure in group.items()}


@dataclass(frozen=True, eq=False)
class PartScores:
    """Scores by model and measure, and the comparisons of every other model with the baseline."""

    scores: dict[str, dict[str, Score]]
    comparisons: dict[str, dict[str, Comparison]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The models scored, in their order; each other one is compared with `baseline`. The rows are the first ones of the
    `available` ones of `source`. `findings`: what may have gone wrong, by model; a leak is under `data`."""

    models: list[ModelResult]
    baseline: ModelResult
    source: str
    available: int
    settings: EvalSettings
    model_set: ModelSet
    notes: list[str]
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, PartScores]:
        """Scores and comparisons of all rows (""), and of each task and source."""
        seed, parts = self.settings.seed, {}
        for part in self.baseline.measures:
            scores: dict[str, dict[str, Score]] = {model.name: {} for model in self.models}
            for model in self.models:
                for group in model.measures.get(part, {}).values():
                    bounds = intervals(group, seed)
                    scores[model.name] |= {name: Score(group[name], one) for name, one in bounds.items()}
            comparisons = {model.name: _compare(self.baseline, model, part, seed) for model in self.others}
            parts[part] = PartScores(scores, comparisons)
        return parts

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """Of all rows, by model and measure."""
        return self.parts[""].scores

    @property
    def others(self) -> list[ModelResult]:
        return [model for model in self.models if model is not self.baseline]

    @property
    def rows_used(self) -> str:
        count = len(self.baseline.rendered.rows)
        which = f"the first {count:,} of {self.available:,}" if count < self.available else f"{count:,}"
        return f"{which} rows: {self.source}"


def score_model(
    eval_model: EvalModel,
    settings: EvalSettings,
    labels: Mapping[str, Labels],
    characters: Sequence[int] | None = None,
    examine: Callable[[EvalModel], Any] | None = None,
) -> ModelResult:
    """Everything that one model is scored on, computed, and `examine` of it. `characters` of each row's trained text:
    given if the models' tokenizers differ, for a loss that they share."""
    rendered = eval_model.rendered
    nats, tokens = compute_losses(eval_model, rendered.rows), trained_tokens(rendered.rows)
    generated = generate_answers(eval_model, rendered.prompts if settings.metrics else [], settings.max_new_tokens)
    likelihoods = {task: compute_likelihoods(eval_model, of_task) for task, of_task in labels.items()}
    examined = examine(eval_model) if examine else None
    answers = [decode_answer(one.tokens, rendered.tokenizer) for one in generated]
    ended = [one.ended for one in generated]
    whole: Groups = {"rows": {"loss": loss(nats, tokens), "perplexity": perplexity(nats, tokens)}}
    if characters is not None:
        whole["rows"]["loss-per-character"] = loss(nats, np.array(characters, dtype=float))
    if answers:
        whole["answers"] = row_scores(settings.metrics, answers, rendered.references)
    measures = {"": whole} | {part: _only(whole, mask, rendered) for part, mask in _masks(rendered).items()}
    classes = {task: score_labels(likelihoods[task], one.truth, one.texts) for task, one in labels.items()}
    for task, scores in classes.items():
        prefix = f"{task}." if task else ""
        whole[f"labels {task}".strip()] = {f"{prefix}label-{name}": value for name, value in scores.measures.items()}
    computed = (nats, tokens, answers, ended, likelihoods, classes)
    return ModelResult(eval_model.spec, rendered, *computed, measures, examined)


def _masks(rendered: RenderedRows) -> dict[str, np.ndarray]:
    """A mask (rows,) for each task, if rows have tags, and for each source, if there are several."""
    sources: dict[str, list[int]] = {}
    if any(source.task for source in rendered.sources):
        for number, source in enumerate(rendered.sources):
            sources.setdefault(f"task {source.task}" if source.task else "no task", []).append(number)
    if len(rendered.sources) > 1:
        sources |= {f"source {source.path}": [number] for number, source in enumerate(rendered.sources)}
    masks = {name: np.isin([row["source"] for row in rendered.rows], numbers) for name, numbers in sources.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _only(measures: Groups, mask: np.ndarray, rendered: RenderedRows) -> Groups:
    """The measures of some rows alone: the others add nothing."""
    masks = {"rows": mask, "answers": mask[rendered.with_answer]}
    return {
        group: {name: replace(measure, rows=measure.rows * masks[group][:, None]) for name, measure in of_group.items()}
        for group, of_group in measures.items()
        if masks[group].any()
    }


def _compare(baseline: ModelResult, model: ModelResult, part: str, seed: int) -> dict[str, Comparison]:
    """All measures that both have; those per token only if both tokenizers cut the rows alike."""
    compared: dict[str, Comparison] = {}
    left_out = () if model.rendered is baseline.rendered else _PER_TOKEN
    for group, measures in baseline.measures[part].items():
        shared = {name: measure for name, measure in measures.items() if name not in left_out}
        compared |= compare(shared, model.measures.get(part, {}).get(group, {}), seed)
    return compared
