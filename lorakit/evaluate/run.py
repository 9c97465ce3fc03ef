"""Scoring: several models on the same held-out rows, each base loaded once, compared with a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorakit.errors import UserError
from lorakit.evaluate.classification import Labels, labels_of
from lorakit.evaluate.comparison import compare_groups, score_groups
from lorakit.evaluate.examined import Examination, findings
from lorakit.evaluate.inference import EvalModel, ModelLoader, Probe, loading_order, run_model
from lorakit.evaluate.models import EvalModelSpec, ModelSet, models_of_run
from lorakit.evaluate.rendering import RenderedRows, render_for_models
from lorakit.evaluate.report_files import write_evaluation
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult, RowsUsed, score_outputs
from lorakit.model.adapters.plain_lora import is_no_op
from lorakit.model.positions import Positions
from lorakit.plan.model_info import read_model_info
from lorakit.plan.row_limits import unseen
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run


def default_settings(prepared: Prepared | None) -> EvalSettings:
    """The settings of a run's recipe; the schema's defaults without a run."""
    if prepared is None:
        return EvalSettings(("exact-match",))
    settings = prepared.recipe.evaluate
    rows = None if settings.rows == "all" else int(settings.rows)
    return EvalSettings(tuple(settings.metrics), settings.max_new_tokens, rows)


def evaluate(run: Run, prepared: Prepared, progress: Progress) -> tuple[list[ModelResult], Path]:
    """Score a run as `lorakit eval RUN` does: its base, its adapter and its merged model. Also returns the file of the
    scores.

    Raises:
        UserError: the recipe names no held-out rows.
    """
    evaluation = score_models(models_of_run(run, prepared), None, default_settings(prepared), progress)
    return evaluation.models, write_evaluation(evaluation, run.evaluations)


def score_models(
    model_set: ModelSet,
    file: Path | None,
    settings: EvalSettings,
    progress: Progress,
    examination: Examination | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> Evaluation:
    """Score every model on the same rows: those of `file`, or the held-out rows of the first run.

    `examination`: what to look for beyond what answers and losses show. `probes`: what else to measure on every model
    while it is in memory; the results are in its `outputs.probed`.

    Raises:
        UserError: there are no rows, or a model could not be loaded.
        LorakitError: a model computes NaN, or memory or the disk is full.
    """
    device = model_set.machine.device
    baseline = find_baseline(model_set, settings.baseline)
    whole, source = render_for_models(model_set, file, progress)
    # Models that share a rendering go on sharing it.
    first = {id(one): replace(one, rows=one.rows[: settings.rows]) for one in whole}
    each = [first[id(one)] for one in whole]
    used = RowsUsed(source, len(each[0].rows), len(whole[0].rows), len(each[0].with_answer))
    alike = all(rendered is each[0] for rendered in each)
    characters = None if alike else each[0].characters
    # Training rows exist only in the tokens of the run, and all models must get the same labels.
    train = model_set.prepared.rows.train_if_there if model_set.prepared and file is None and alike else None
    labels = {id(rendered): labels_of(rendered, train) for rendered in each}
    max_new_tokens = settings.max_new_tokens if settings.metrics else 0
    notes = _check_lengths(model_set, each, labels, max_new_tokens)
    apart = [one.name for one, rendered in zip(model_set.specs, each, strict=True) if rendered is not each[0]]
    if apart:
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{model_set.specs[0].name}: losses per token are of other tokens and are not compared; "
            "loss-per-character is"
        )
    for note in notes:
        progress.warn(note)
    loader, results = ModelLoader(device), {}
    all_probes = {**(examination.probes if examination else {}), **(probes or {})}
    for at in loading_order(model_set.specs):
        spec, rendered = model_set.specs[at], each[at]
        eval_model = EvalModel(spec, rendered, spec.identity(device), loader, settings.cache, progress)
        outputs = run_model(eval_model, max_new_tokens, labels[id(rendered)], all_probes)
        results[at] = score_outputs(spec, rendered, outputs, settings.metrics, labels[id(rendered)], characters)
    models = [results[at] for at in range(len(model_set.specs))]
    for note in _idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = _compare(models, models[baseline], used, settings, model_set, notes)
    return replace(evaluation, findings=findings(evaluation, examination, file, progress))


def find_baseline(model_set: ModelSet, named: str | None) -> int:
    """The number of the model that the others are compared with: the one named, else the base, else the first.

    Raises:
        UserError: no model has this name.
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


def _check_lengths(
    model_set: ModelSet, each: Sequence[RenderedRows], labels: Mapping[int, Mapping[str, Labels]], answers: int
) -> list[str]:
    """Notes on rows that come near the end of a model's positions; an error where a model cannot compute a row.

    `labels` of each rendering, by its id. `answers`: the most tokens of an answer; 0 if none is generated.
    """
    notes = []
    for spec, rendered in zip(model_set.specs, each, strict=True):
        facts = read_model_info(spec.base.folder)
        if facts and facts.positions:
            labelled = [
                rendered.rows[row]["answer"] + max(map(len, task.tokens))
                for task in labels[id(rendered)].values()
                for row in task.rows
                if task.tokens
            ]
            notes += _length_note(spec, facts.positions, rendered, max(labelled, default=0), answers)
    return list(dict.fromkeys(notes))


def _length_note(
    spec: EvalModelSpec, positions: Positions, rendered: RenderedRows, labelled: int, answers: int
) -> list[str]:
    """`labelled`: the tokens of the longest prompt with the longest of its labels."""
    limit, prompts = positions.limit, [len(prompt) for prompt in rendered.prompts]
    rows = [len(row["input_ids"]) for row in rendered.rows]
    longest = max([*rows, labelled])
    if not positions.hard:
        longest = max([longest, *(prompt + answers for prompt in prompts)])
        note = f"{spec.name}: a row with its answer takes up to {longest:,} tokens, {unseen(positions)}"
        return [note] if longest > limit else []
    if longest > limit:
        where = rendered.rows[rows.index(max(rows))]["where"]
        beyond = sum(row > limit for row in rows)
        raise UserError(
            f"{spec.name}: {beyond or 1:,} of {len(rows):,} rows go beyond the model's {limit:,} positions "
            f"({positions.key}), and it has embeddings for no more; the longest, {where}, takes {longest:,} tokens. "
            f"Leave longer rows out: write data.max_length: {limit} in the recipe, or shorter rows."
        )
    cut = sum(prompt + answers > limit + 1 for prompt in prompts) if answers else 0
    note = (
        f"{spec.name}: after {cut:,} of {len(prompts):,} prompts there is no room for {answers:,} tokens: the "
        f"model has {limit:,} positions ({positions.key}). Answers end there"
    )
    return [note] if cut else []


def _idle_adapters(models: Sequence[ModelResult]) -> list[str]:
    """A note on each adapter that changes nothing: by its weights, or because no loss differs from the base's."""
    notes = []
    for model in models:
        spec, nats = model.spec, model.outputs.nats
        if spec.adapter is None:
            continue
        bare = next((one for one in models if one.spec.adapter is None and one.spec.base_key == spec.base_key), None)
        if is_no_op(spec.adapter):
            notes.append(f"{spec.name}: changes nothing: one half of each of its changes is zero")
        elif bare and len(bare.outputs.nats) == len(nats) and (bare.outputs.nats == nats).all():
            notes.append(f"{spec.name}: changes nothing: every row has exactly the loss that it has without it")
    return notes


def _compare(
    models: list[ModelResult],
    baseline: ModelResult,
    used: RowsUsed,
    settings: EvalSettings,
    model_set: ModelSet,
    notes: list[str],
) -> Evaluation:
    seed, others, parts = settings.seed, [model for model in models if model is not baseline], list(baseline.parts)
    same_tokens = {model.name: model.rendered is baseline.rendered for model in others}
    return Evaluation(
        models,
        baseline,
        used,
        settings,
        model_set,
        scores={model.name: score_groups(model.measures, seed) for model in models},
        comparisons={
            model.name: compare_groups(baseline.measures, model.measures, same_tokens[model.name], seed)
            for model in others
        },
        parts={part: {model.name: score_groups(model.parts.get(part, {}), seed) for model in models} for part in parts},
        part_comparisons={
            part: {
                model.name: compare_groups(
                    baseline.parts[part], model.parts.get(part, {}), same_tokens[model.name], seed
                )
                for model in others
            }
            for part in parts
        },
        notes=notes,
    )
