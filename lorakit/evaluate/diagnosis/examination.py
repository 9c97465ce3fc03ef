"""What may have gone wrong with adapters: the findings of an evaluation, and what else they measure on the models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.dataset import Examples
from lorakit.data.general_texts import GeneralText, read_general_texts
from lorakit.errors import UserError
from lorakit.evaluate.cache import digest, get_or_compute, open_cache
from lorakit.evaluate.diagnosis.finding import Finding, describe_finding
from lorakit.evaluate.diagnosis.leak import measure_leak, rendered_row_stats
from lorakit.evaluate.diagnosis.losses import (
    DRIFT,
    FORGETTING,
    compute_text_losses,
    measure_drift,
    measure_forgetting,
    measure_memorization,
)
from lorakit.evaluate.diagnosis.parroting import SpanIndex, index_spans, measure_parroting
from lorakit.evaluate.diagnosis.style import measure_style
from lorakit.evaluate.inference import EvalModel, Probe, compute_losses
from lorakit.evaluate.likelihood import trained_tokens
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import reference_of
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult
from lorakit.prepare import Prepared
from lorakit.progress import Progress

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200
_GENERAL, _TRAINING = "general texts", "training rows"


@dataclass(frozen=True, eq=False)
class Examination:
    """What `--diagnose` measures besides answers and held-out losses. `base` is what the others are compared with."""

    model_set: ModelSet
    texts: list[GeneralText]
    base: EvalModelSpec

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Some training rows of the first run, spread evenly; none if it was trained on another base."""
        prepared, train = self.model_set.prepared, _training_examples(self.model_set.prepared)
        if (
            prepared is None
            or train is None
            or prepared.base.sha256(".safetensors") != self.base.base.sha256(".safetensors")
        ):
            return []
        numbers = np.unique(np.linspace(0, len(train.rows) - 1, min(_SAMPLE, len(train.rows))).astype(int))
        return [train.rows[int(number)] for number in numbers]

    @property
    def probes(self) -> dict[str, Probe]:
        """What to measure of every model while it is in memory; None of a model that these findings are not about."""
        probes: dict[str, Probe] = {_GENERAL: self._probe_general, _TRAINING: self._probe_training}
        return probes

    def is_about(self, spec: EvalModelSpec) -> bool:
        """Whether a model was made from the base. An adapter on another quantization differs by that too."""
        if spec.adapter is not None:
            return spec.base_key == self.base.base_key
        trained = _trained_from(spec, self.model_set)
        return trained is not None and trained.base.sha256(".safetensors") == self.base.base.sha256(".safetensors")

    def saw_sample(self, spec: EvalModelSpec) -> bool:
        """Whether a model was trained on the rows of the sample."""
        return self.is_about(spec) and _trained_from(spec, self.model_set) is self.model_set.prepared

    def _probe_general(self, eval_model: EvalModel) -> tuple[np.ndarray, np.ndarray] | None:
        """Nats and tokens of each general text."""
        if not (eval_model.spec is self.base or self.is_about(eval_model.spec)):
            return None
        tokenizer, texts = eval_model.rendered.tokenizer, [row.text for row in self.texts]

        def compute(missing: list[int], save: Callable[[Mapping[int, Any]], None]) -> None:
            chosen, label = [texts[at] for at in missing], f"{eval_model.spec.name}: general texts"
            nats, tokens = compute_text_losses(eval_model.model, tokenizer, chosen, eval_model.progress, label)
            save(dict(enumerate(np.stack([nats, tokens], axis=1).tolist())))

        file = open_cache("losses", eval_model.identity | {"texts": "general"}, eval_model.cache)
        keys = [digest(list(tokenizer(text)["input_ids"])) for text in texts]
        values = np.array(get_or_compute(file, keys, compute), dtype=float)
        return values[:, 0], values[:, 1]

    def _probe_training(self, eval_model: EvalModel) -> np.ndarray | None:
        """Nats of each row of the sample."""
        if not self.sample or not (eval_model.spec is self.base or self.saw_sample(eval_model.spec)):
            return None
        return compute_losses(replace(eval_model, rendered=replace(eval_model.rendered, rows=self.sample)))


def create_examination(model_set: ModelSet, file: Path | None = None) -> Examination:
    """The examination of these models; `file`: general texts instead of the bundled ones.

    Raises:
        UserError: there is no base to compare with, or the file has no texts.
    """
    base = next((spec for spec in model_set.specs if spec.kind == "base"), None)
    if base is None:
        raise UserError(
            "--diagnose: compares with the base model, which is not among these. Add the word base, or give one run "
            "alone."
        )
    try:
        return Examination(model_set, read_general_texts(file), base)
    except UserError as error:
        raise UserError(f"--general: {error}") from error


def _trained_from(spec: EvalModelSpec, model_set: ModelSet) -> Prepared | None:
    """What a model was trained from, if that is known. The merged model of a run is given by the run."""
    if spec.prepared is None and model_set.run is not None and spec.given == str(model_set.run.folder):
        return model_set.prepared
    return spec.prepared


def _training_examples(prepared: Prepared | None) -> Examples | None:
    return prepared.rows.train_if_there if prepared else None


def diagnose_models(
    evaluation: Evaluation, examination: Examination | None, file: Path | None, progress: Progress
) -> dict[str, list[Finding]]:
    """The findings about each model but the base, by its name; a leak is about the rows, under the name `data`.

    Without an examination they are those of the models' answers and held-out losses. `file`: where the rows come from,
    if not from the run.
    """
    findings: dict[str, list[Finding]] = {}
    base = next((model for model in evaluation.models if model.spec.kind == "base"), None)
    settings, indexes = evaluation.settings, dict[int, SpanIndex | None]()
    for model in evaluation.models:
        if model is base:
            continue
        of_model = []
        if model.answers:
            trained = _trained_from(model.spec, evaluation.model_set)
            if id(trained) not in indexes:
                indexes[id(trained)] = _index_training_answers(trained, progress)
            of_model += _answer_findings(model, base, indexes[id(trained)], settings)
        if examination is not None and base is not None:
            of_model += _loss_findings(model, base, examination, settings.seed)
        if of_model:
            findings[model.name] = of_model
    for name, drift in _drift_findings(evaluation, base).items():
        findings.setdefault(name, []).append(drift)
    prepared = evaluation.model_set.prepared
    train = _training_examples(prepared)
    if file and prepared and train is not None:
        # As the first run's tokenizer renders both.
        rendered = next(model.rendered for model in evaluation.models if model.spec.prepared is prepared)
        stats = [rendered_row_stats(rows, prepared, progress) for rows in (train.rows, rendered.rows)]
        findings.setdefault("data", []).append(measure_leak(*stats))
    return findings


def _index_training_answers(prepared: Prepared | None, progress: Progress) -> SpanIndex | None:
    """The answers that a model was trained on, to look for copies of them; None if they are not known."""
    train = _training_examples(prepared)
    if prepared is None or train is None:
        return None
    texts = []
    with progress.bar("training answers", total=len(train.rows)) as bar:
        for row in train.rows:
            if row["answer"] >= 0:
                texts.append(reference_of(row, prepared.tokenizer, prepared.stop_ids))
            bar.advance()
    return index_spans(texts) if texts else None


def _answer_findings(
    model: ModelResult, base: ModelResult | None, index: SpanIndex | None, settings: EvalSettings
) -> list[Finding]:
    rendered, answers = model.rendered, model.answers
    prompts = [str(rendered.tokenizer.decode(prompt)) for prompt in rendered.prompts]
    findings = []
    if index is not None:
        of_base = base.answers if base and len(base.answers) == len(answers) else None
        findings.append(measure_parroting(answers, prompts, rendered.references, index, of_base, settings.seed))
    cut = [not answer.ended for answer in model.outputs.answers]
    rows = [rendered.rows[number] for number in rendered.with_answer]
    longer = [len(row["input_ids"]) - row["answer"] > settings.max_new_tokens for row in rows]
    return [*findings, *measure_style(answers, rendered.references, prompts, cut, longer, settings.seed)]


def _loss_findings(model: ModelResult, base: ModelResult, examination: Examination, seed: int) -> list[Finding]:
    if not examination.is_about(model.spec):
        return []
    (base_nats, base_tokens), (nats, tokens) = base.outputs.probed[_GENERAL], model.outputs.probed[_GENERAL]
    if not np.array_equal(base_tokens, tokens):
        return [FORGETTING.unmeasured("its tokenizer splits the texts into other tokens than the base's")]
    registers = [row.register for row in examination.texts]
    findings = [measure_forgetting(base_nats, nats, tokens, registers, seed)]
    if examination.sample and examination.saw_sample(model.spec) and model.rendered is base.rendered:
        sample_tokens = trained_tokens(examination.sample)
        train = (base.outputs.probed[_TRAINING], model.outputs.probed[_TRAINING], sample_tokens)
        findings.append(measure_memorization(train, (base.outputs.nats, model.outputs.nats, model.tokens), seed))
    return findings


def _drift_findings(evaluation: Evaluation, base: ModelResult | None) -> dict[str, Finding]:
    """By model, for each adapter that was scored on several quantizations of its base."""
    by_adapter: dict[Any, dict[str, ModelResult]] = {}
    for model in evaluation.models:
        if model.spec.adapter is not None:
            key = (model.spec.adapter, id(model.rendered))
            by_adapter.setdefault(key, {})[model.spec.settings.quantization] = model
    findings: dict[str, Finding] = {}
    for models in by_adapter.values():
        full = models.get("none")
        if len(models) == 1:
            continue
        if full is None:
            unmeasured = DRIFT.unmeasured("it was not scored on the full base: add none to --quantizations")
            findings |= {model.name: unmeasured for model in models.values()}
            continue
        nats = {word: model.outputs.nats for word, model in models.items()}
        alike = base is not None and base.rendered is full.rendered and base.spec.base_key == full.spec.base_key
        base_nats = base.outputs.nats if base and alike else None
        drift = measure_drift(nats, full.tokens, base_nats, evaluation.settings.seed)
        findings |= {models[word].name: finding for word, finding in drift.items()}
    return findings


def describe_flagged(findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What is flagged, a text each."""
    return [
        f"{name}: {describe_finding(finding)}"
        for name, of_model in findings.items()
        for finding in of_model
        if finding.flagged
    ]
