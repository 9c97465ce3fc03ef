"""A gate of a pipeline: the least that a score may be (`--fail-under`), and another model that none may be worse than
(`--not-worse-than`), judged on rows that neither of the two was trained on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.amounts import counted, format_difference
from lorakit.data.filter_and_split import find_leaks
from lorakit.errors import UserError
from lorakit.evaluate.diagnosis.copying import rendered_row_stats
from lorakit.evaluate.diagnosis.examination import trained_from
from lorakit.evaluate.metric import LEAST_ROWS, Comparison, Measure
from lorakit.evaluate.models import ModelSet, place_of, run_folder
from lorakit.evaluate.run import Evaluation, ModelResult, compare_models
from lorakit.model.endpoint import shown_address
from lorakit.prepare import GivenRows
from lorakit.progress import Progress
from lorakit.recipe.fields import entry_name
from lorakit.registry import METRICS, Unit
from lorakit.run_dir import Run

_OF_SHARES = "this score is a share, and 1 is 100%"
_LOSSES = ("loss", "perplexity", "loss-per-character")
Limits = list[tuple[str, float]]
"""Scores and a number for each: the worst that it may be, or by how much it may be worse."""


@dataclass(frozen=True, eq=False)
class JudgedScore:
    """A score of a model beside the reference's. `margin`: by how much it may be worse, in its unit."""

    name: str
    comparison: Comparison
    measure: Measure
    margin: float

    @property
    def fails(self) -> bool:
        """Whether the whole interval lies beyond the margin."""
        interval = self.comparison.interval
        return interval is not None and (-interval.high if self.measure.higher else interval.low) > self.margin

    def to_dict(self) -> dict[str, Any]:
        return {**self.comparison.to_dict(), "margin": self.margin, "passed": not self.fails}


@dataclass(frozen=True, eq=False)
class Gate:
    """A model beside the reference, on so many `rows`; `left_out`: those that one of the two was trained on. `part`:
    which rows these are, where they are not all that were scored."""

    model: str
    against: str
    rows: int
    left_out: int
    scores: tuple[JudgedScore, ...]
    part: str = ""

    @property
    def failures(self) -> list[str]:
        """What is worse, in words."""
        return [self._describe(one) for one in self.scores if one.fails]

    def _describe(self, one: JudgedScore) -> str:
        interval, signed = one.comparison.interval, partial(format_difference, unit=one.measure.unit)
        bounds = f" ({signed(interval.low)} to {signed(interval.high)})" if interval else ""
        figures = f"{signed(one.comparison.difference)}{bounds} on {counted(one.comparison.rows, 'row')}"
        allowed = f", {signed(one.margin)[1:]} allowed" if one.margin else ""
        part = f", {self.part}" if self.part else ""
        return f"{self.model}: {one.name} is worse than that of {self.against}: {figures}{part}{allowed}"

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"model": self.model, "against": self.against, "part": self.part}
        facts |= {"rows": self.rows, "left_out": self.left_out}
        scores = {one.name: one.to_dict() for one in self.scores}
        return {**facts, "passed": not any(one.fails for one in self.scores), "scores": scores}


def parse_limits(option: str, written: Iterable[str], metrics: Sequence[Any], optional: bool = False) -> Limits:
    """Each `metric=value` of an option as the score and the number; a share may be 0.8 or 80%. `optional`: whether the
    value may be left out, for 0."""
    measured = [*_LOSSES, *map(entry_name, metrics)]
    limits: Limits = []
    for text in written:
        name, equals, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            number = math.nan if equals or not optional else 0.0
        if not (name and math.isfinite(number)):
            example = "json-valid, or json-valid=2%" if optional else "exact-match=0.8"
            raise UserError(f"{option}: {text!r} is not a score with its value. Write for example {example}.")
        if name.partition(".")[0] not in measured and "label-" not in name:
            raise UserError(f"{option}: {name!r} is not measured. Write one of {', '.join(measured)}.")
        if optional and number < 0:
            raise UserError(f"{option}: {text!r}: by how much a score may be worse is 0 or more. Write {name}.")
        if value.endswith("%") and name not in _LOSSES and _unit_of(name) == "points":
            points = value.removesuffix("%").strip()
            raise UserError(f"{option}: {text!r}: this score is in points, of 100. Write {name}={points}.")
        limits.append((name, number))
    return limits


def _unit_of(score: str) -> Unit | None:
    """The unit of a metric's scores; None of what is no metric's name."""
    metric = score.partition(".")[0]
    return METRICS[metric].unit if metric in METRICS.names() else None


def find_reference(model_set: ModelSet, given: str) -> int:
    """The number of the model of `--not-worse-than`."""
    places = (place_of(given), shown_address(given))
    return next(at for at, spec in enumerate(model_set.specs) if place_of(spec.given) in places)


def judged_models(evaluation: Evaluation, reference: ModelResult | None = None) -> list[ModelResult]:
    """What a gate is for: every model but the baseline, the reference (on other quantizations too) and the base that is
    prompted, or the baseline where there is no other."""
    given = reference.spec.given if reference else None
    others = (model for model in evaluation.others if model.spec.given != given and not model.spec.prompting)
    return list(others) or [evaluation.baseline]


def find_failures(evaluation: Evaluation, thresholds: Limits, reference: ModelResult | None = None) -> list[str]:
    """What is worse than its threshold, of every model judged. A server, which gives no losses, is passed over where
    another model has them."""
    by_model, failed = evaluation.parts[""].scores, []
    models = judged_models(evaluation, reference)
    for name, worst in thresholds:
        without = [model for model in models if name not in by_model[model.name]]
        if without and (len(without) == len(models) or not all(model.spec.endpoint for model in without)):
            scores = ", ".join(by_model[without[0].name])
            raise UserError(f"--fail-under: {name!r} is not measured here. Write one of {scores}.")
        for model in models:
            if model in without:
                continue
            measure = by_model[model.name][name].measure
            if measure.unit == "share" and abs(worst) > 1:
                raise UserError(f"--fail-under: {name}={worst:g}: {_OF_SHARES}. Write for example {name}=80%.")
            value, above = measure.value, measure.higher is False
            if math.isnan(value) or (value > worst if above else value < worst):
                side = "above" if above else "under"
                failed.append(f"{model.name}: {name} is {measure.write(value)}, {side} {measure.write(worst)}")
    return failed


def judge(
    evaluation: Evaluation, reference: ModelResult, limits: Limits, file: Path | GivenRows | None, progress: Progress
) -> list[Gate]:
    """Each model beside the reference. `limits`: the scores to judge and their margins; without any the loss and each
    metric's first score. `file`: of the rows, if they are not the first run's. UserError where nothing can be
    judged."""
    models = judged_models(evaluation, reference)
    if file is None:
        _tell_of_other_rows(evaluation, reference, progress)
    gates = []
    for model in models:
        trained = trained_rows(evaluation, [model, reference], file, progress)
        if trained.all():
            what = f"every row was trained on by {model.name} or {reference.name}"
            raise UserError(f"--not-worse-than: {what}. Give other rows with --data FILE.")
        gates.append(judge_rows(evaluation, model, reference, trained, limits))
        if (rows := gates[-1].scores[0].comparison.rows) < LEAST_ROWS:
            what = f"{model.name}: too few rows to tell whether it is worse than {reference.name}"
            progress.warn(f"{what}: {rows:,}, and an interval takes {LEAST_ROWS}")
    return gates


def judge_rows(
    evaluation: Evaluation,
    model: ModelResult,
    reference: ModelResult,
    trained: np.ndarray,
    limits: Limits = [],  # noqa: B006
    part: tuple[str, np.ndarray] | None = None,
) -> Gate:
    """A model beside the reference on rows that neither was `trained` on (a mask). `part`: of all rows some (a mask),
    with their name."""
    name, some = part or ("", np.ones(len(trained), bool))
    rows = some & ~trained
    compared = compare_models(reference, model, evaluation.settings.seed, mask=None if rows.all() else rows)
    measures = {name: one for group in model.measures[""].values() for name, one in group.items()}
    scores = [
        JudgedScore(name, compared[name], measures[name], margin)
        for name, margin in limits or _main_scores(compared, measures, evaluation)
        if _can_be_worse(name, margin, compared, measures)
    ]
    left_out = int((some & trained).sum())
    return Gate(model.name, reference.name, int(rows.sum()), left_out, tuple(scores), name)


def _main_scores(compared: dict[str, Comparison], measures: dict[str, Measure], evaluation: Evaluation) -> Limits:
    """The loss, per character where only that is of the same things, and the first score of each metric."""
    losses = [name for name in ("loss", "loss-per-character") if name in compared]
    metrics = map(entry_name, evaluation.settings.metrics)
    of_metrics = [[name for name in compared if name.split(".")[0] == metric] for metric in metrics]
    names = [*losses[:1], *(names[0] for names in of_metrics if names and measures[names[0]].higher is not None)]
    if not names:
        what = "no loss and no metric is measured of both models"
        raise UserError(f"--not-worse-than: {what}. Write --metrics A,B, or give rows with answers (--data FILE).")
    return [(name, 0.0) for name in names]


def _can_be_worse(name: str, margin: float, compared: dict[str, Comparison], measures: dict[str, Measure]) -> bool:
    """Whether a score can be judged: UserError where it is none of both models, neither more nor less is better, or
    nothing would be worse by more than the margin."""
    if name not in compared:
        raise UserError(f"--on: {name!r} is not compared here. Write some of {', '.join(compared)}.")
    if measures[name].higher is None:
        raise UserError(f"--on: {name!r} has no better and no worse. Write another score.")
    if measures[name].unit == "share" and margin >= 1:
        raise UserError(f"--on: {name}={margin:g}: {_OF_SHARES}, so nothing would fail. Write for example {name}=2%.")
    return True


def _tell_of_other_rows(evaluation: Evaluation, reference: ModelResult, progress: Progress) -> None:
    """Say so where the reference's run has other held-out rows than those that are scored."""
    prepared, run = reference.spec.prepared, evaluation.model_set.run
    if run is None or prepared is None or prepared is evaluation.model_set.prepared:
        return
    of_both = [Run(run_folder(one)).read_manifest()["data"] for one in (str(run.folder), reference.spec.given)]
    sha256s = [(data.get("tokens_sha256") or {}).get("eval") for data in of_both]
    if sha256s[0] != sha256s[1]:
        what = f"{reference.name}: has other held-out rows; both are scored on {evaluation.source}"
        progress.say(f"{what}. --data FILE picks others")


def trained_rows(
    evaluation: Evaluation, models: Sequence[ModelResult], file: Path | GivenRows | None, progress: Progress
) -> np.ndarray:
    """A mask (rows,) of those that some of the models was trained on, white space and case aside; of the first run's
    own held-out rows that run's models are known to have none."""
    rows = evaluation.baseline.rendered.rows
    mask, model_set = np.zeros(len(rows), bool), evaluation.model_set
    for model in models:
        prepared = trained_from(model.spec, model_set)
        if model.spec.kind == "base" or (file is None and prepared is not None and prepared is model_set.prepared):
            continue
        train = prepared.rows.read_or_warn("train") if prepared else None
        if prepared is None or train is None:
            what = f"{model.name}: its training rows are not known here"
            progress.warn(f"{what}: whether it was trained on rows that are scored was not looked at")
            continue
        own, of_training = (
            rendered_row_stats(of, prepared, progress, near=False) for of in (model.rendered.rows, train.rows)
        )
        if leaks := find_leaks(own, of_training, nearly=False):
            mask[[leak.row for leak in leaks]] = True
            some = ", ".join(str(rows[leak.row]["where"]) for leak in leaks[:3])
            what = f"{len(leaks):,} of {len(rows):,} rows were trained on by {model.name} ({some})"
            progress.warn(f"{what}: they are left out of the comparison")
    return mask
