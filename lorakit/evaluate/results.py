"""One subject on the rows: what it lost and said, and the measures of that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorakit.evaluate.classification import Classification, classification
from lorakit.evaluate.generate import Answer, text_of
from lorakit.evaluate.labels import Labels
from lorakit.evaluate.losses import trained_tokens
from lorakit.evaluate.metric import Measure, loss, perplexity
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.rendering import RenderedRows
from lorakit.evaluate.scores import row_scores

Groups = dict[str, dict[str, Measure]]
"""Measures by what they are taken on; those of one group hold the same rows: `rows`, `answers`, and `labels` of a
task."""

PER_TOKEN = ("loss", "perplexity")
"""Measures that two models share only where their tokenizers cut the rows alike."""


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """What a subject's model gave, or the cache. `nats` (rows,): the loss summed over each row's trained tokens.
    `said`: the generated answer to each row that has one, none where no metric asks for any. `likelihoods` (rows of
    the task, labels), in nats, by the task's tag. `probed`: what probes found, by their name."""

    nats: np.ndarray
    answers: list[Answer]
    likelihoods: dict[str, np.ndarray]
    probed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModelResult:
    """What one subject made of the rows.

    `tokens` (rows,): trained ones of each row. `answers`: what was said, as texts, to the prompts and references of
    `asked`. `parts`: the same measures of the rows of one task, or of one source, alone.
    """

    spec: EvalModelSpec
    rendered: RenderedRows
    outputs: ModelOutputs
    tokens: np.ndarray
    answers: list[str]
    classifications: dict[str, Classification]
    measures: Groups
    parts: dict[str, Groups]

    @property
    def name(self) -> str:
        """The subject's column."""
        return self.spec.name

    @property
    def scores(self) -> dict[str, float]:
        """Each measure's value over all rows."""
        return values_of(self.measures)


def values_of(groups: Groups) -> dict[str, float]:
    """Each measure's value, of all groups."""
    return {name: measure.value for group in groups.values() for name, measure in group.items()}


def score_outputs(
    spec: EvalModelSpec,
    rendered: RenderedRows,
    found: ModelOutputs,
    metrics: Sequence[Any],
    labels: Mapping[str, Labels],
    characters: Sequence[int] | None = None,
) -> ModelResult:
    """The measures of what a subject lost and said.

    `characters` of each row's trained text: given where the subjects' tokenizers differ, for a loss that they share.
    """
    tokens = trained_tokens(rendered.rows)
    answers = [text_of(answer, rendered.tokenizer) for answer in found.answers]
    measures: Groups = {"rows": {"loss": loss(found.nats, tokens), "perplexity": perplexity(found.nats, tokens)}}
    if characters is not None:
        measures["rows"]["loss-per-character"] = loss(found.nats, np.array(characters, dtype=float))
    if answers:
        measures["answers"] = row_scores(metrics, answers, rendered.references).measures
    parts = {name: _part(measures, rows, rendered) for name, rows in _parts(rendered)}
    classified = {
        task: classification(likely, labels[task].truth, labels[task].texts)
        for task, likely in found.likelihoods.items()
    }
    for task, one in classified.items():
        of_task = f"{task}." if task else ""
        measures[f"labels {task}".strip()] = {f"{of_task}label-{name}": value for name, value in one.measures.items()}
    return ModelResult(spec, rendered, found, tokens, answers, classified, measures, parts)


def _parts(rendered: RenderedRows) -> Iterator[tuple[str, set[int]]]:
    """The rows of each task, where rows have tags, and of each source, where there are several."""
    tags = dict.fromkeys(source.task for source in rendered.sources)
    of_row = [rendered.sources[row["source"]] for row in rendered.rows]
    for tag in tags if any(tags) else ():
        rows = {number for number, source in enumerate(of_row) if source.task == tag}
        if rows:
            yield (f"task {tag}" if tag else "no task"), rows
    for source in rendered.sources if len(rendered.sources) > 1 else ():
        rows = {number for number, one in enumerate(of_row) if one is source}
        if rows:
            yield f"source {source.path}", rows


def _part(measures: Groups, rows: set[int], rendered: RenderedRows) -> Groups:
    """The measures of some rows alone: the others add nothing."""
    chosen = {"rows": [number in rows for number in range(len(rendered.rows))]}
    chosen["answers"] = [number in rows for number in rendered.with_answer]
    return {
        group: {
            name: replace(measure, rows=measure.rows * np.array(chosen[group])[:, None])
            for name, measure in those.items()
        }
        for group, those in measures.items()
        if any(chosen[group])
    }
