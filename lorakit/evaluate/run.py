"""Scoring: subjects on the same held-out rows, one load for each base, and what sets them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.evaluate.comparison import comparisons, part_comparisons, score_groups
from lorakit.evaluate.evaluation import EvalSettings, Evaluation, RowsUsed
from lorakit.evaluate.examined import Examination, findings
from lorakit.evaluate.inference import EvalModel, EvalRequest, Probe, run_model
from lorakit.evaluate.labels import labels_of
from lorakit.evaluate.loaded import ModelLoader, loading_order
from lorakit.evaluate.models import ModelSet, models_of_run
from lorakit.evaluate.rendering import RenderedRows, render_for_models
from lorakit.evaluate.report_files import write_evaluation
from lorakit.evaluate.results import ModelResult, score_outputs
from lorakit.evaluate.row_limits import compare_lengths
from lorakit.evaluate.scores import row_scores
from lorakit.model.adapters.plain_lora import is_no_op
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run


def score_models(
    model_set: ModelSet,
    file: Path | None,
    settings: EvalSettings,
    progress: Progress,
    examination: Examination | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> Evaluation:
    """Score every subject on the same rows: those of `file`, or the held-out rows of the first run.

    `examination`: what to look for besides what answers and losses tell by themselves. `probes`: what else to ask every
    model for while it is in memory; what they find stands in its `found.probed`.

    Raises:
        UserError: there are no rows, or a model cannot be had.
        LorakitError: a model gives no numbers, or memory or the disk is full.
    """
    baseline = find_baseline(model_set, settings.baseline)
    whole, source = render_for_models(model_set, file, progress)
    each = _first(whole, settings.rows)
    used = RowsUsed(source, len(each[0].rows), len(whole[0].rows), len(each[0].with_answer))
    alike = all(rendered is each[0] for rendered in each)
    characters = None if alike else each[0].characters
    loaded, found = ModelLoader(model_set.machine.device), {}
    # Training rows are there in the tokens of the run alone; all models are asked for the same labels.
    train = model_set.prepared.rows.train_if_there if model_set.prepared and file is None and alike else None
    asking = {**(examination.probes if examination else {}), **(probes or {})}
    labels = {id(rendered): labels_of(rendered, train) for rendered in each}
    lengths = compare_lengths(model_set, each, labels, settings.max_new_tokens if settings.metrics else 0)
    notes = _notes(model_set, each, lengths, progress)
    for at in loading_order(model_set.specs):
        spec, rendered = model_set.specs[at], each[at]
        facts = spec.identity(model_set.machine.device)
        eval_model = EvalModel(spec, rendered, facts, loaded, settings.cache, progress)
        generate = bool(settings.metrics and rendered.with_answer)  # texts have no answer to generate
        wanted = EvalRequest(generate, settings.max_new_tokens, labels[id(rendered)], asking)
        answer = run_model(eval_model, wanted)
        found[at] = score_outputs(spec, rendered, answer, settings.metrics, labels[id(rendered)], characters)
    models = [found[at] for at in range(len(model_set.specs))]
    for note in find_idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = _evaluated(models, models[baseline], used, settings, model_set, notes)
    return replace(evaluation, findings=findings(evaluation, examination, file, progress))


def _evaluated(
    models: list[ModelResult],
    baseline: ModelResult,
    used: RowsUsed,
    settings: EvalSettings,
    model_set: ModelSet,
    notes: list[str],
) -> Evaluation:
    others, seed = [model for model in models if model is not baseline], settings.seed
    parts = list(baseline.parts)
    return Evaluation(
        models,
        baseline,
        used,
        settings,
        model_set,
        {model.name: score_groups(model.measures, seed) for model in models},
        {model.name: comparisons(baseline, model, seed) for model in others},
        {part: {model.name: score_groups(model.parts.get(part, {}), seed) for model in models} for part in parts},
        {part: {model.name: part_comparisons(baseline, model, part, seed) for model in others} for part in parts},
        notes,
    )


def find_idle_adapters(models: Sequence[ModelResult]) -> list[str]:
    """What to say of adapters that change nothing: their weights say so, or no loss is another than without them."""
    told = []
    for model in models:
        spec = model.spec
        if spec.adapter is None:
            continue
        bare = next((one for one in models if one.spec.adapter is None and one.spec.base_key == spec.base_key), None)
        if is_no_op(spec.adapter):
            told.append(f"{spec.name}: changes nothing: one half of each of its changes is zero")
        elif (
            bare
            and len(bare.outputs.nats) == len(model.outputs.nats)
            and (bare.outputs.nats == model.outputs.nats).all()
        ):
            told.append(f"{spec.name}: changes nothing: every row has exactly the loss that it has without it")
    return told


def find_baseline(model_set: ModelSet, named: str | None) -> int:
    """The number of the subject that the others are compared with: the one named, else the base, else the first.

    Raises:
        UserError: no subject has this name.
    """
    names = [spec.name for spec in model_set.specs]
    if named is None:
        kinds = [spec.kind for spec in model_set.specs]
        return kinds.index("base") if "base" in kinds else 0
    if named in names:
        return names.index(named)
    given = [spec.given.rstrip("/") for spec in model_set.specs]
    if given.count(named.rstrip("/")) == 1:
        return given.index(named.rstrip("/"))
    raise UserError(f"--baseline: {named}: not one of the models that are scored. Write one of {', '.join(names)}.")


def _first(whole: Sequence[RenderedRows], rows: int | None) -> list[RenderedRows]:
    """The first rows; subjects that share a rendering share it still."""
    if rows is None or rows >= len(whole[0].rows):
        return list(whole)
    short = {id(rendered): replace(rendered, rows=rendered.rows[:rows]) for rendered in whole}
    return [short[id(rendered)] for rendered in whole]


def _notes(model_set: ModelSet, each: Sequence[RenderedRows], lengths: list[str], progress: Progress) -> list[str]:
    """What the user should know before the table is read; said here."""
    notes = list(lengths)
    apart = [one.name for one, rendered in zip(model_set.specs, each, strict=True) if rendered is not each[0]]
    if apart:
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{model_set.specs[0].name}: losses per token are of other tokens and are not compared; "
            "loss-per-character is"
        )
    for note in notes:
        progress.warn(note)
    return notes


def default_settings(prepared: Prepared | None) -> EvalSettings:
    """What the recipe of a run asks for; the schema's defaults where there is no run."""
    if prepared is None:
        return EvalSettings(("exact-match",))
    settings = prepared.recipe.evaluate
    rows = None if settings.rows == "all" else int(settings.rows)
    return EvalSettings(tuple(settings.metrics), settings.max_new_tokens, rows)


def metric_scores(metrics: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Each metric over the rows that have it; a metric's parts are named `metric.part`."""
    return row_scores(metrics, answers, references).values


def evaluate(run: Run, prepared: Prepared, progress: Progress) -> tuple[list[ModelResult], Path]:
    """A run scored as `lorakit eval RUN` does: its base, its adapter and its merged model; and the file of the scores.

    Raises:
        UserError: the recipe names no held-out rows.
    """
    evaluation = score_models(models_of_run(run, prepared), None, default_settings(prepared), progress)
    return evaluation.models, write_evaluation(evaluation, run.evaluations)
