"""Scoring: several models on the same held-out rows, each base loaded once, compared with a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from lorakit.errors import UserError
from lorakit.evaluate.classification import Labels, labels_of
from lorakit.evaluate.diagnosis.examination import Examination, diagnose_models
from lorakit.evaluate.inference import EvalModel, ModelLoader, loading_order
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import RenderedRows, render_for_models
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult, score_model
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
    baseline = find_baseline(model_set, settings.baseline)
    whole, source = render_for_models(model_set, file, progress)
    # Models that share a rendering go on sharing it.
    first = {id(one): replace(one, rows=one.rows[: settings.rows]) for one in whole}
    each = [first[id(one)] for one in whole]
    apart = [spec.name for spec, rendered in zip(model_set.specs, each, strict=True) if rendered is not each[0]]
    # Training rows exist only in the tokens of the run, and all models must get the same labels.
    prepared = model_set.prepared if file is None and not apart else None
    train = prepared.rows.read_or_warn("train") if prepared else None
    labels = {id(one): labels_of(one, train) for one in each}
    answer = settings.max_new_tokens if settings.metrics else 0
    pairs = [(spec, rendered, labels[id(rendered)]) for spec, rendered in zip(model_set.specs, each, strict=True)]
    notes = list(dict.fromkeys(chain(*(_length_notes(*of_model, answer) for of_model in pairs))))
    if apart:
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{pairs[0][0].name}: losses per token are of other tokens and are not compared; loss-per-character is"
        )
    for note in notes:
        progress.warn(note)
    loader, results = ModelLoader(model_set.machine.device), dict[int, ModelResult]()
    characters, examine = each[0].characters if apart else None, examination.measure if examination else None
    for at in loading_order(model_set.specs):
        spec, rendered, of_rows = pairs[at]
        eval_model = EvalModel(spec, rendered, loader, settings.cache, progress)
        results[at] = score_model(eval_model, settings, of_rows, characters, examine)
    models = [results[at] for at in range(len(pairs))]
    for note in _idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = Evaluation(models, models[baseline], source, len(whole[0].rows), settings, model_set, notes)
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
    """A note if rows come near the end of a model's positions; an error if the model cannot compute one. `answer`: the
    most tokens of an answer; 0 if none is generated."""
    info = read_model_info(spec.base.folder)
    if info is None or info.positions is None:
        return []
    positions, limit = info.positions, info.positions.limit
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
