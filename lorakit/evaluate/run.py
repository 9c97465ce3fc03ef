"""Scoring: several models on the same held-out rows, each base loaded once, compared with a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorakit.errors import UserError
from lorakit.evaluate.classification import Labels, labels_of
from lorakit.evaluate.diagnosis.examination import Examination, diagnose_models
from lorakit.evaluate.inference import EvalModel, ModelLoader, loading_order, run_model
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import RenderedRows, render_for_models
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult, compare_models, score_outputs
from lorakit.model.adapters.plain_lora import is_no_op
from lorakit.plan.checkpoint import unseen
from lorakit.plan.model_info import read_model_info
from lorakit.prepare import Prepared
from lorakit.progress import Progress


def default_settings(prepared: Prepared | None) -> EvalSettings:
    """The settings of a run's recipe; the schema's defaults without a run."""
    if prepared is None:
        return EvalSettings(("exact-match",))
    settings = prepared.recipe.evaluate
    rows = None if settings.rows == "all" else int(settings.rows)
    return EvalSettings(tuple(settings.metrics), settings.max_new_tokens, rows)


def score_models(
    model_set: ModelSet,
    file: Path | None,
    settings: EvalSettings,
    progress: Progress,
    examination: Examination | None = None,
) -> Evaluation:
    """Score every model on the same rows: those of `file`, or the held-out rows of the first run. `examination`: what
    to look for beyond what answers and losses show."""
    device = model_set.machine.device
    baseline = find_baseline(model_set, settings.baseline)
    whole, source = render_for_models(model_set, file, progress)
    # Models that share a rendering go on sharing it.
    first = {id(one): replace(one, rows=one.rows[: settings.rows]) for one in whole}
    each = [first[id(one)] for one in whole]
    alike = all(rendered is each[0] for rendered in each)
    characters = None if alike else each[0].characters
    # Training rows exist only in the tokens of the run, and all models must get the same labels.
    train = model_set.prepared.rows.train_if_there if model_set.prepared and file is None and alike else None
    labels = {id(rendered): labels_of(rendered, train) for rendered in each}
    max_new_tokens = settings.max_new_tokens if settings.metrics else 0
    pairs = list(zip(model_set.specs, each, strict=True))
    lengths = [_length_notes(spec, rendered, labels[id(rendered)], max_new_tokens) for spec, rendered in pairs]
    notes = list(dict.fromkeys(note for of_model in lengths for note in of_model))
    if not alike:
        apart = [spec.name for spec, rendered in pairs if rendered is not each[0]]
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{pairs[0][0].name}: losses per token are of other tokens and are not compared; loss-per-character is"
        )
    for note in notes:
        progress.warn(note)
    loader, results, probes = ModelLoader(device), {}, examination.probes if examination else {}
    for at in loading_order(model_set.specs):
        spec, rendered = pairs[at]
        eval_model = EvalModel(spec, rendered, spec.identity(device), loader, settings.cache, progress)
        outputs = run_model(eval_model, max_new_tokens, labels[id(rendered)], probes)
        results[at] = score_outputs(spec, rendered, outputs, settings.metrics, labels[id(rendered)], characters)
    models = [results[at] for at in range(len(model_set.specs))]
    for note in _idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = compare_models(models, models[baseline], source, len(whole[0].rows), settings, model_set, notes)
    return replace(evaluation, findings=diagnose_models(evaluation, examination, file, progress))


def find_baseline(model_set: ModelSet, named: str | None) -> int:
    """The number of the model that the others are compared with: the one named, else the base, else the first."""
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


def _length_notes(spec: EvalModelSpec, rendered: RenderedRows, labels: Mapping[str, Labels], answer: int) -> list[str]:
    """Notes on rows that come near the end of a model's positions; an error if the model cannot compute a row.
    `answer`: the most tokens of an answer; 0 if none is generated."""
    info = read_model_info(spec.base.folder)
    if info is None or info.positions is None:
        return []
    positions, limit = info.positions, info.positions.limit
    rows, prompts = [len(row["input_ids"]) for row in rendered.rows], [len(prompt) for prompt in rendered.prompts]
    labelled = [
        rendered.rows[row]["answer"] + max(map(len, task.tokens)) for task in labels.values() for row in task.rows
    ]
    longest = max([*rows, *labelled])
    if not positions.hard:
        longest = max([longest, *(prompt + answer for prompt in prompts)])
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
    cut = sum(prompt + answer > limit + 1 for prompt in prompts) if answer else 0
    if not cut:
        return []
    return [
        f"{spec.name}: after {cut:,} of {len(prompts):,} prompts there is no room for {answer:,} tokens: the "
        f"model has {limit:,} positions ({positions.key}). Answers end there"
    ]


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
