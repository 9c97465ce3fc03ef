"""Scoring: subjects on the same held-out rows, one load for each base, and what sets them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.evaluate.asked import Asked
from lorakit.evaluate.asking import Probe, Wanted, Witness, ask
from lorakit.evaluate.compared import comparisons, part_comparisons, scores_of
from lorakit.evaluate.evaluation import Evaluation, Request, RowsUsed
from lorakit.evaluate.examined import Examination, findings
from lorakit.evaluate.labels import labels_of
from lorakit.evaluate.loaded import Loaded, in_loading_order
from lorakit.evaluate.renderings import asked_of
from lorakit.evaluate.row_limits import compare_lengths
from lorakit.evaluate.scored import Scored, scored
from lorakit.evaluate.scores import row_scores
from lorakit.evaluate.subjects import Lineup, line_up_run
from lorakit.evaluate.written import write_evaluation
from lorakit.model.adapter_effect import changes_nothing
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run


def score_lineup(
    lineup: Lineup,
    file: Path | None,
    request: Request,
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
    baseline = baseline_of(lineup, request.baseline)
    whole, source = asked_of(lineup, file, progress)
    each = _first(whole, request.rows)
    used = RowsUsed(source, len(each[0].rows), len(whole[0].rows), len(each[0].with_answer))
    alike = all(asked is each[0] for asked in each)
    characters = None if alike else each[0].characters
    loaded, found = Loaded(lineup.machine.device), {}
    # Training rows are there in the tokens of the run alone; all models are asked for the same labels.
    train = lineup.prepared.rows.train_if_there if lineup.prepared and file is None and alike else None
    asking = {**(examination.probes if examination else {}), **(probes or {})}
    labels = {id(asked): labels_of(asked, train) for asked in each}
    lengths = compare_lengths(lineup, each, labels, request.max_new_tokens if request.metrics else 0)
    notes = _notes(lineup, each, lengths, progress)
    for at in in_loading_order(lineup.subjects):
        subject, asked = lineup.subjects[at], each[at]
        facts = subject.facts(lineup.machine.device)
        witness = Witness(subject, asked, facts, loaded, request.cache, progress)
        generate = bool(request.metrics and asked.with_answer)  # texts have no answer to generate
        wanted = Wanted(generate, request.max_new_tokens, labels[id(asked)], asking)
        answer = ask(witness, wanted)
        found[at] = scored(subject, asked, answer, request.metrics, labels[id(asked)], characters)
    models = [found[at] for at in range(len(lineup.subjects))]
    for note in idle_adapters(models):
        progress.warn(note)
        notes.append(note)
    evaluation = _evaluated(models, models[baseline], used, request, lineup, notes)
    return replace(evaluation, findings=findings(evaluation, examination, file, progress))


def _evaluated(
    models: list[Scored], baseline: Scored, used: RowsUsed, request: Request, lineup: Lineup, notes: list[str]
) -> Evaluation:
    others, seed = [model for model in models if model is not baseline], request.seed
    parts = list(baseline.parts)
    return Evaluation(
        models,
        baseline,
        used,
        request,
        lineup,
        {model.name: scores_of(model.measures, seed) for model in models},
        {model.name: comparisons(baseline, model, seed) for model in others},
        {part: {model.name: scores_of(model.parts.get(part, {}), seed) for model in models} for part in parts},
        {part: {model.name: part_comparisons(baseline, model, part, seed) for model in others} for part in parts},
        notes,
    )


def idle_adapters(models: Sequence[Scored]) -> list[str]:
    """What to say of adapters that change nothing: their weights say so, or no loss is another than without them."""
    told = []
    for model in models:
        subject = model.subject
        if subject.adapter is None:
            continue
        bare = next((one for one in models if one.subject.adapter is None and one.subject.held == subject.held), None)
        if changes_nothing(subject.adapter):
            told.append(f"{subject.name}: changes nothing: one half of each of its changes is zero")
        elif bare and len(bare.found.nats) == len(model.found.nats) and (bare.found.nats == model.found.nats).all():
            told.append(f"{subject.name}: changes nothing: every row has exactly the loss that it has without it")
    return told


def baseline_of(lineup: Lineup, named: str | None) -> int:
    """The number of the subject that the others are compared with: the one named, else the base, else the first.

    Raises:
        UserError: no subject has this name.
    """
    names = [subject.name for subject in lineup.subjects]
    if named is None:
        kinds = [subject.kind for subject in lineup.subjects]
        return kinds.index("base") if "base" in kinds else 0
    if named in names:
        return names.index(named)
    given = [subject.given.rstrip("/") for subject in lineup.subjects]
    if given.count(named.rstrip("/")) == 1:
        return given.index(named.rstrip("/"))
    raise UserError(f"--baseline: {named}: not one of the models that are scored. Write one of {', '.join(names)}.")


def _first(whole: Sequence[Asked], rows: int | None) -> list[Asked]:
    """The first rows; subjects that share a rendering share it still."""
    if rows is None or rows >= len(whole[0].rows):
        return list(whole)
    short = {id(asked): asked.of(range(rows)) for asked in whole}
    return [short[id(asked)] for asked in whole]


def _notes(lineup: Lineup, each: Sequence[Asked], lengths: list[str], progress: Progress) -> list[str]:
    """What the user should know before the table is read; said here."""
    notes = list(lengths)
    apart = [one.name for one, asked in zip(lineup.subjects, each, strict=True) if asked is not each[0]]
    if apart:
        notes.append(
            f"{', '.join(apart)}: rows are rendered with another tokenizer or chat template than those of "
            f"{lineup.subjects[0].name}: losses per token are of other tokens and are not compared; "
            "loss-per-character is"
        )
    for note in notes:
        progress.warn(note)
    return notes


def request_of(prepared: Prepared | None) -> Request:
    """What the recipe of a run asks for; the schema's defaults where there is no run."""
    if prepared is None:
        return Request(("exact-match",))
    settings = prepared.recipe.evaluate
    rows = None if settings.rows == "all" else int(settings.rows)
    return Request(tuple(settings.metrics), settings.max_new_tokens, rows)


def metric_scores(metrics: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Each metric over the rows that have it; a metric's parts are named `metric.part`."""
    return row_scores(metrics, answers, references).values


def evaluate(run: Run, prepared: Prepared, progress: Progress) -> tuple[list[Scored], Path]:
    """A run scored as `lorakit eval RUN` does: its base, its adapter and its merged model; and the file of the scores.

    Raises:
        UserError: the recipe names no held-out rows.
    """
    evaluation = score_lineup(line_up_run(run, prepared), None, request_of(prepared), progress)
    return evaluation.models, write_evaluation(evaluation, run.evaluations)
