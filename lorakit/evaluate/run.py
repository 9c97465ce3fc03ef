"""Scoring: several models on the same held-out rows, each base loaded once, compared with a baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.answers import decode_answer
from lorakit.data.rows import IGNORED
from lorakit.errors import UserError
from lorakit.evaluate import inference
from lorakit.evaluate.classification import Labels, LabelScores, labels_of, score_labels
from lorakit.evaluate.diagnosis.examination import Examination, diagnose_models
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.forward import trained_tokens
from lorakit.evaluate.metric import (
    Comparison,
    Measure,
    Score,
    average_by_row,
    compare,
    intervals,
    loss,
    perplexity,
    row_scores,
)
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.prompting import (
    AnswerCosts,
    PromptingComparison,
    add_prompts,
    compare_with_prompting,
    costs_of,
    describe_missing_rival,
)
from lorakit.evaluate.rendering import MOST_TASKS, RenderedRows, Turns, positions_of_model, render_for_models
from lorakit.evaluate.served_answers import add_chat_prompts, ask_for_rows
from lorakit.model.peft_adapter import is_no_op
from lorakit.plan.model_info import unseen
from lorakit.prepare import GivenRows, Prepared
from lorakit.progress import Progress

Groups = dict[str, dict[str, Measure]]
"""Measures by what they are taken on: `rows`, `answers`, `labels` of a task; those of one group hold the same rows."""
# Two models share these only if their tokenizers cut the rows alike.
_PER_TOKEN = ("loss", "perplexity")


@dataclass(frozen=True)
class EvalSettings:
    """How to score. `metrics` as the recipe has them; `rows`: only the first ones, None is all; `seed` is for the
    intervals; `cache`: read what was computed before, and write what is computed; `turns`: which answers of a row."""

    metrics: tuple[Any, ...] = ()
    max_new_tokens: int = 64
    rows: int | None = None
    seed: int = 0
    cache: bool = True
    baseline: str | None = None
    turns: Turns = "last"


@dataclass(frozen=True, eq=False)
class ModelResult:
    """What one model computed on the rows, and the measures of it. `nats` (rows,): the loss summed over each row's
    trained `tokens` (rows,), both empty of a server, which gives no losses. `answers` to the prompts of `rendered`,
    none if no metric needs them, and whether the model `ended` each. `likelihoods` (rows of the task, labels), in nats,
    by the task's tag. `measures` of all rows ("") and of those of one task, or one source, alone. `examined`: what else
    was measured of the model in memory, or what the server sent. `costs`: of the answers that were generated here."""

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
    costs: AnswerCosts | None = None

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
            comparisons = {model.name: compare_models(self.baseline, model, seed, part) for model in self.others}
            parts[part] = PartScores(scores, comparisons)
        return parts

    @cached_property
    def prompting(self) -> list[PromptingComparison]:
        """What was trained against the base with a better prompt."""
        return compare_with_prompting(self.models, self.settings.seed)

    @cached_property
    def missing_rival(self) -> str | None:
        """How to measure a better prompt, where that is still to be done."""
        return describe_missing_rival(self.models, self.model_set)

    @property
    def others(self) -> list[ModelResult]:
        return [model for model in self.models if model is not self.baseline]

    @property
    def rows_used(self) -> str:
        count = len(self.baseline.rendered.rows)
        which = f"the first {count:,} of {self.available:,}" if count < self.available else f"{count:,}"
        return f"{which} rows: {self.source}"


def score_model(
    eval_model: inference.EvalModel,
    settings: EvalSettings,
    labels: Mapping[str, Labels],
    characters: Sequence[int] | None = None,
    examine: Callable[[inference.EvalModel], Any] | None = None,
) -> ModelResult:
    """Everything that one model is scored on, computed, and `examine` of it. `characters` of each row's trained text:
    given if the models' tokenizers differ, for a loss that they share."""
    rendered = eval_model.rendered
    if eval_model.spec.endpoint:
        return _score_server(eval_model, settings)
    nats, tokens = inference.compute_losses(eval_model, rendered.rows), trained_tokens(rendered.rows)
    prompts = rendered.prompts if settings.metrics else []
    generated = inference.generate_answers(eval_model, prompts, settings.max_new_tokens)
    likelihoods = {task: inference.compute_likelihoods(eval_model, of_task) for task, of_task in labels.items()}
    examined = examine(eval_model) if examine else None
    answers = [decode_answer(one.tokens, rendered.tokenizer) for one in generated]
    ended = [one.ended for one in generated]
    whole: Groups = {"rows": {"loss": loss(nats, tokens), "perplexity": perplexity(nats, tokens)}}
    if characters is not None:
        whole["rows"]["loss-per-character"] = loss(nats, np.array(characters, dtype=float))
    if answers:
        whole["answers"] = _answer_scores(settings.metrics, answers, rendered)
    measures = {"": whole} | {part: _only(whole, mask, rendered) for part, mask in _masks(rendered).items()}
    classes = {task: score_labels(likelihoods[task], one.truth, one.texts) for task, one in labels.items()}
    for task, scores in classes.items():
        prefix = f"{task}." if task else ""
        whole[f"labels {task}".strip()] = {f"{prefix}label-{name}": value for name, value in scores.measures.items()}
    computed = (nats, tokens, answers, ended, likelihoods, classes)
    costs = costs_of(prompts, generated) if generated else None
    return ModelResult(eval_model.spec, rendered, *computed, measures, examined, costs)


def _answer_scores(metrics: Sequence[Any], answers: Sequence[str], rendered: RenderedRows) -> dict[str, Measure]:
    """The metrics of the answers, as measures of the rows that have some."""
    scores = row_scores(metrics, answers, rendered.references)
    return {name: average_by_row(measure, rendered.with_answer) for name, measure in scores.items()}


def _score_server(eval_model: inference.EvalModel, settings: EvalSettings) -> ModelResult:
    """What a server's model is scored on: its answers alone."""
    rendered, whole = eval_model.rendered, Groups()
    served = ask_for_rows(eval_model, settings.max_new_tokens) if settings.metrics else None
    answers = served.texts(rendered.tokenizer) if served else []
    ended = [one.ended for one in served.answers] if served else []
    if answers:
        whole["answers"] = row_scores(settings.metrics, answers, rendered.references)
    measures = {"": whole} | {part: _only(whole, mask, rendered) for part, mask in _masks(rendered).items()}
    empty = np.zeros(0)
    return ModelResult(eval_model.spec, rendered, empty, empty, answers, ended, {}, {}, measures, served)


def _masks(rendered: RenderedRows) -> dict[str, np.ndarray]:
    """A mask (rows,) for each task, if rows have tags, and for each source, if there are several."""
    tags, sources = np.array(rendered.tags), np.array([row["source"] for row in rendered.rows])
    masks: dict[str, np.ndarray] = {}
    if any(rendered.tags):
        masks |= {f"task {tag}" if tag else "no task": tags == tag for tag in dict.fromkeys(rendered.tags)}
    if len(rendered.sources) > 1:
        masks |= {f"source {source.path}": sources == number for number, source in enumerate(rendered.sources)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _only(measures: Groups, mask: np.ndarray, rendered: RenderedRows) -> Groups:
    """The measures of some rows alone: the others add nothing. Those of labels are of whole tasks, and are left out."""
    masks = {"rows": mask, "answers": mask[sorted({*rendered.with_answer})]}
    return {
        group: {name: replace(measure, rows=measure.rows * masks[group][:, None]) for name, measure in of_group.items()}
        for group, of_group in measures.items()
        if group in masks and masks[group].any()
    }


def compare_models(
    first: ModelResult, second: ModelResult, seed: int, part: str = "", mask: np.ndarray | None = None
) -> dict[str, Comparison]:
    """The second model against the first in all measures that both have, of a part of the rows, or of those of a
    `mask`; those per token only if both tokenizers cut the rows alike."""
    compared: dict[str, Comparison] = {}
    left_out = () if _trains_the_same(second.rendered, first.rendered) else _PER_TOKEN
    groups = [model.measures.get(part, {}) for model in (first, second)]
    if mask is not None:
        groups = [_only(one, mask, model.rendered) for one, model in zip(groups, (first, second), strict=True)]
    for group, measures in groups[0].items():
        shared = {name: measure for name, measure in measures.items() if name not in left_out}
        compared |= compare(shared, groups[1].get(group, {}), seed)
    return compared


def _trains_the_same(one: RenderedRows, other: RenderedRows) -> bool:
    """Whether two renderings have the same trained tokens, maybe after other prompts."""
    if one is other:
        return True
    trained = [[[token for token in row["labels"] if token != IGNORED] for row in each.rows] for each in (one, other)]
    return one.tokenizer is other.tokenizer and trained[0] == trained[1]


def default_settings(prepared: Prepared | None) -> EvalSettings:
    """The settings of a run's recipe; the schema's defaults without a run."""
    if prepared is None:
        return EvalSettings(("exact-match",))
    settings = prepared.recipe.evaluate
    rows = None if settings.rows == "all" else int(settings.rows)
    return EvalSettings(tuple(settings.metrics), settings.max_new_tokens, rows, turns=settings.turns)


def score_models(
    model_set: ModelSet,
    file: Path | GivenRows | None,
    settings: EvalSettings,
    progress: Progress,
    examination: Examination | None = None,
) -> Evaluation:
    """Score every model on the same rows: those of `file`, or the held-out rows of the first run. `examination`: what
    to look for beyond what answers and losses show."""
    baseline = find_baseline(model_set, settings.baseline)
    rendered_rows, source = render_for_models(model_set, file, progress)
    whole, notes = add_chat_prompts(rendered_rows, model_set, file, progress)
    # Models that share a rendering go on sharing it.
    if settings.turns == "all":
        _refuse_single_turns(model_set)
    first = {id(one): replace(one, rows=one.rows[: settings.rows], turns=settings.turns) for one in whole}
    each = [first[id(one)] for one in whole]
    apart = [spec.name for spec, rendered in zip(model_set.specs, each, strict=True) if rendered is not each[0]]
    each = add_prompts(each, model_set, file, progress)
    # Training rows exist only in the tokens of the run, and all models must get the same labels.
    prepared = model_set.prepared if file is None and not apart else None
    train = prepared.rows.read_or_warn("train") if prepared else None
    labels = {id(one): labels_of(one, train) for one in each}
    answer = settings.max_new_tokens if settings.metrics else 0
    pairs = [(spec, rendered, labels[id(rendered)]) for spec, rendered in zip(model_set.specs, each, strict=True)]
    notes += dict.fromkeys(chain(*(_length_notes(*of_model, answer) for of_model in pairs)))
    if apart:
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{pairs[0][0].name}: losses per token are of other tokens and are not compared; loss-per-character is"
        )
    tags = len({row["task"] for row in each[0].rows})
    if tags > MOST_TASKS:
        notes.append(
            f"the rows have {tags:,} different tags in the column task, more than {MOST_TASKS}: no scores by task"
        )
    for note in notes:
        progress.warn(note)
    loader, results = inference.ModelLoader(model_set.machine.device), dict[int, ModelResult]()
    characters, examine = each[0].characters if apart else None, examination.measure if examination else None
    for at in inference.loading_order(model_set.specs):
        spec, rendered, of_rows = pairs[at]
        eval_model = inference.EvalModel(spec, rendered, loader, settings.cache, progress)
        results[at] = score_model(eval_model, settings, of_rows, characters, examine)
    models = [results[at] for at in range(len(pairs))]
    for note in _idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = Evaluation(models, models[baseline], source, len(whole[0].rows), settings, model_set, notes)
    return replace(evaluation, findings=diagnose_models(evaluation, examination, file, progress))


def _refuse_single_turns(model_set: ModelSet) -> None:
    """What is asked for a row's last answer alone cannot be compared on all of them."""
    for spec in model_set.specs:
        if spec.endpoint:
            reason = "a server is asked for the last answer of a row alone"
            raise UserError(f"evaluate.turns: all: {spec.name}: {reason}. Write --turns last.")


def find_baseline(model_set: ModelSet, named: str | None) -> int:
    """The number of the model that the others are compared with: the one named, else the base, else the first."""
    names, kinds = [spec.name for spec in model_set.specs], [spec.kind for spec in model_set.specs]
    if named is None:
        return kinds.index("base") if "base" in kinds else 0
    for known in (names, [spec.given.rstrip("/") for spec in model_set.specs]):
        if known.count(named.rstrip("/")) == 1:
            return known.index(named.rstrip("/"))
    raise UserError(f"--baseline: {named}: not one of the models that are scored. Write one of {', '.join(names)}.")


def _length_notes(spec: EvalModelSpec, rendered: RenderedRows, labels: Mapping[str, Labels], answer: int) -> list[str]:
    """A note if rows come near the end of a model's positions; an error if the model cannot compute one. `answer`: the
    most tokens of an answer; 0 if none is generated."""
    positions = positions_of_model(spec)
    if positions is None:
        return []
    limit = positions.limit
    rows, prompts = [len(row["input_ids"]) for row in rendered.rows], [len(prompt) for prompt in rendered.prompts]
    of_labels = [(row, max(map(len, task.tokens))) for task in labels.values() for row in task.rows]
    longest = max([*rows, *(rendered.rows[row]["answer"] + label for row, label in of_labels)])
    if not positions.hard:
        longest = max([longest, *(prompt + answer for prompt in prompts)])
        note = f"{spec.name}: a row with its answer takes up to {longest:,} tokens, {unseen(positions)}"
        return [note] if longest > limit else []
    if longest > limit:
        raise UserError(
            f"{spec.name}: {max(sum(row > limit for row in rows), 1):,} of {len(rows):,} rows go beyond the model's "
            f"{limit:,} positions ({positions.key}), and it has embeddings for no more; the longest, "
            f"{rendered.rows[rows.index(max(rows))]['where']}, takes {longest:,} tokens. Leave longer rows out: write "
            f"data.max_length: {limit} in the recipe, or shorter rows."
        )
    cut = sum(prompt + answer > limit + 1 for prompt in prompts) if answer else 0
    what = f"after {cut:,} of {len(prompts):,} prompts there is no room for {answer:,} tokens"
    where = f"the model has {limit:,} positions ({positions.key})"
    return [f"{spec.name}: {what}: {where}. Answers end there"] if cut else []


def _idle_adapters(models: Sequence[ModelResult]) -> list[str]:
    """A note on each adapter that changes nothing: by its weights, or because no loss differs from the base's."""
    notes, bare = [], {model.spec.base_key: model.nats for model in models if model.spec.adapter is None}
    for spec, nats in ((model.spec, model.nats) for model in models):
        if spec.adapter and is_no_op(spec.adapter):
            notes.append(f"{spec.name}: changes nothing: one half of each of its changes is zero")
        elif spec.adapter and np.array_equal(bare.get(spec.base_key, ()), nats):
            notes.append(f"{spec.name}: changes nothing: every row has exactly the loss that it has without it")
    return notes
