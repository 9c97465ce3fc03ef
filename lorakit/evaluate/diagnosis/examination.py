"""What may have gone wrong with adapters: the findings of an evaluation, and what else they measure on the models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.dataset import Examples
from lorakit.data.general_texts import GeneralText, read_general_texts
from lorakit.errors import UserError
from lorakit.evaluate.diagnosis import copying, losses
from lorakit.evaluate.diagnosis.finding import Finding, describe_finding
from lorakit.evaluate.diagnosis.style import measure_style
from lorakit.evaluate.inference import EvalModel, Save, compute_losses
from lorakit.evaluate.likelihood import trained_tokens
from lorakit.evaluate.models import EvalModelSpec, ModelSet, have_same_weights
from lorakit.evaluate.rendering import Row, reference_of
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult
from lorakit.prepare import Prepared
from lorakit.progress import Progress

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200


@dataclass(frozen=True, eq=False)
class Examination:
    """What `--diagnose` measures besides answers and held-out losses. `base` is what the others are compared with."""

    model_set: ModelSet
    texts: list[GeneralText]
    base: EvalModelSpec

    @cached_property
    def sample(self) -> list[Row]:
        """Some training rows of the first run, spread evenly; none if it was trained on another base."""
        prepared = self.model_set.prepared
        train = _training_examples(prepared)
        if prepared is None or train is None or not have_same_weights(prepared.base, self.base.base):
            return []
        numbers = np.unique(np.linspace(0, len(train.rows) - 1, min(_SAMPLE, len(train.rows))).astype(int))
        return [train.rows[int(number)] for number in numbers]

    def is_about(self, spec: EvalModelSpec) -> bool:
        """Whether a model was made from the base. An adapter on another quantization differs by that too."""
        if spec.adapter is not None:
            return spec.base_key == self.base.base_key
        trained = _trained_from(spec, self.model_set)
        return trained is not None and have_same_weights(trained.base, self.base.base)

    def saw_sample(self, spec: EvalModelSpec) -> bool:
        """Whether a model was trained on the rows of the sample."""
        return bool(self.sample) and _trained_from(spec, self.model_set) is self.model_set.prepared

    def measure(self, eval_model: EvalModel) -> dict[str, np.ndarray]:
        """`nats` and `tokens` of each general text, and the nats of each row of the `sample`; nothing of a model that
        these findings are not about."""
        spec, tokenizer, texts = eval_model.spec, eval_model.rendered.tokenizer, [row.text for row in self.texts]
        if spec is not self.base and not self.is_about(spec):
            return {}

        def work(model: Any, missing: list[int], save: Save) -> None:
            chosen, label = [texts[at] for at in missing], f"{spec.name}: general texts"
            nats, tokens = losses.compute_text_losses(model, tokenizer, chosen, eval_model.progress, label)
            save(dict(enumerate(np.stack([nats, tokens], axis=1).tolist())))

        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
        values = np.array(eval_model.compute("losses", {"texts": "general"}, rows, work), dtype=float)
        measured = {"nats": values[:, 0], "tokens": values[:, 1]}
        if self.sample and (spec is self.base or self.saw_sample(spec)):
            measured["sample"] = compute_losses(eval_model, self.sample)
        return measured


def create_examination(model_set: ModelSet, file: Path | None = None) -> Examination:
    """The examination of these models; `file`: general texts instead of the bundled ones."""
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
    """The findings about each model but the base, by its name; a leak is about the rows, under the name `data`. Without
    an examination they are those of the models' answers and held-out losses. `file`: where the rows come from, if not
    from the run."""
    base = next((model for model in evaluation.models if model.spec.kind == "base"), None)
    findings, indexes = _drift_findings(evaluation, base), dict[int, copying.SpanIndex | None]()
    for model in evaluation.models:
        of_model = []
        if model is not base and model.answers:
            trained = _trained_from(model.spec, evaluation.model_set)
            if id(trained) not in indexes:
                indexes[id(trained)] = _index_training_answers(trained, progress)
            of_model += _answer_findings(model, base, indexes[id(trained)], evaluation.settings)
        if model is not base and base is not None and examination is not None and examination.is_about(model.spec):
            of_model += _loss_findings(model, base, examination, evaluation.settings.seed)
        findings[model.name] = [*of_model, *findings.pop(model.name, [])]
    prepared = evaluation.model_set.prepared
    train = _training_examples(prepared)
    if file and prepared and train is not None:
        # As the first run's tokenizer renders both.
        rendered = next(model.rendered for model in evaluation.models if model.spec.prepared is prepared)
        stats = [copying.rendered_row_stats(rows, prepared, progress) for rows in (train.rows, rendered.rows)]
        findings.setdefault("data", []).append(copying.measure_leak(*stats))
    return {name: of_model for name, of_model in findings.items() if of_model}


def _index_training_answers(prepared: Prepared | None, progress: Progress) -> copying.SpanIndex | None:
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
    return copying.index_spans(texts) if texts else None


def _answer_findings(
    model: ModelResult, base: ModelResult | None, index: copying.SpanIndex | None, settings: EvalSettings
) -> list[Finding]:
    rendered, answers, seed = model.rendered, model.answers, settings.seed
    prompts, findings = [str(rendered.tokenizer.decode(prompt)) for prompt in rendered.prompts], []
    if index is not None:
        of_base = base.answers if base and len(base.answers) == len(answers) else None
        findings.append(copying.measure_parroting(answers, prompts, rendered.references, index, of_base, seed))
    cut = [not ended for ended in model.ended]
    rows = [rendered.rows[number] for number in rendered.with_answer]
    longer = [len(row["input_ids"]) - row["answer"] > settings.max_new_tokens for row in rows]
    return [*findings, *measure_style(answers, rendered.references, prompts, cut, longer, seed)]


def _loss_findings(model: ModelResult, base: ModelResult, examination: Examination, seed: int) -> list[Finding]:
    before, after = base.examined, model.examined
    if not np.array_equal(before["tokens"], after["tokens"]):
        return [losses.FORGETTING.unmeasured("its tokenizer splits the texts into other tokens than the base's")]
    registers = [row.register for row in examination.texts]
    findings = [losses.measure_forgetting(before["nats"], after["nats"], after["tokens"], registers, seed)]
    if "sample" in after and model.rendered is base.rendered:
        train = (before["sample"], after["sample"], trained_tokens(examination.sample))
        findings.append(losses.measure_memorization(train, (base.nats, model.nats, model.tokens), seed))
    return findings


def _drift_findings(evaluation: Evaluation, base: ModelResult | None) -> dict[str, list[Finding]]:
    """By model, for each adapter that was scored on several quantizations of its base."""
    by_adapter: dict[Any, dict[str, ModelResult]] = {}
    for model in evaluation.models:
        if model.spec.adapter is not None:
            key = (model.spec.adapter, id(model.rendered))
            by_adapter.setdefault(key, {})[model.spec.settings.quantization] = model
    findings: dict[str, list[Finding]] = {}
    for models in (models for models in by_adapter.values() if len(models) > 1):
        full = models.get("none")
        if full is None:
            unmeasured = losses.DRIFT.unmeasured("it was not scored on the full base: add none to --quantizations")
            findings |= {model.name: [unmeasured] for model in models.values()}
            continue
        nats = {word: model.nats for word, model in models.items()}
        alike = base is not None and base.rendered is full.rendered and base.spec.base_key == full.spec.base_key
        base_nats = base.nats if base and alike else None
        drift = losses.measure_drift(nats, full.tokens, base_nats, evaluation.settings.seed)
        findings |= {models[word].name: [finding] for word, finding in drift.items()}
    return findings


def describe_flagged(findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What is flagged, a text each."""
    pairs = ((name, finding) for name, of_model in findings.items() for finding in of_model)
    return [f"{name}: {describe_finding(finding)}" for name, finding in pairs if finding.flagged]
