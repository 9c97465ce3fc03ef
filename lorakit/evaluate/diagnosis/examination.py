"""What may have gone wrong with adapters: the findings of an evaluation, and what they ask of the models besides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.cleaning.row_stats import RowStats, compute_row_stats
from lorakit.data.conversations import Conversation, RowContent, Text
from lorakit.data.general_texts import GeneralText, read_general_texts
from lorakit.errors import UserError
from lorakit.evaluate.cache import digest, get_or_compute, open_cache
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.diagnosis.general import compute_text_losses
from lorakit.evaluate.diagnosis.leak import measure_leak
from lorakit.evaluate.diagnosis.losses import DRIFT, FORGETTING, measure_drift, measure_forgetting
from lorakit.evaluate.diagnosis.parroting import measure_memorization, measure_parroting
from lorakit.evaluate.diagnosis.sentences import describe_finding
from lorakit.evaluate.diagnosis.spans import SpanIndex, index_spans
from lorakit.evaluate.diagnosis.style import measure_style
from lorakit.evaluate.inference import EvalModel, Probe, compute_losses
from lorakit.evaluate.likelihood import trained_tokens
from lorakit.evaluate.models import EvalModelSpec, ModelSet, weight_digests
from lorakit.evaluate.rendering import RenderedRows, reference_of
from lorakit.evaluate.results import EvalSettings, Evaluation, ModelResult
from lorakit.prepare import Prepared
from lorakit.progress import Progress

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200
_GENERAL, _TRAINED = "general", "trained on"


@dataclass(frozen=True, eq=False)
class Examination:
    """What is looked for. `texts` are general ones; `base` is the subject that the others are compared with."""

    model_set: ModelSet
    texts: list[GeneralText]
    base: EvalModelSpec

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Some training rows of the first run, evenly out of all; none where the base is that of another model."""
        prepared = self.model_set.prepared
        if prepared is None or weight_digests(prepared.base) != weight_digests(self.base.base):
            return []
        train = prepared.rows.train_if_there
        if train is None:
            return []
        rows = train.rows
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int))
        return [rows[int(number)] for number in chosen]

    @property
    def probes(self) -> dict[str, Probe]:
        """What is asked of every model while it is in memory: only of those that these findings can be about."""
        rendered: dict[str, Probe] = {_GENERAL: self._general, _TRAINED: self._trained_on}
        return rendered

    def is_about(self, spec: EvalModelSpec) -> bool:
        """Whether a subject was made from the base. An adapter on another quantization differs by that too."""
        if spec.adapter is not None:
            return spec.base_key == self.base.base_key
        trained = _trained_from(spec, self.model_set)
        return trained is not None and weight_digests(trained.base) == weight_digests(self.base.base)

    def saw_sample(self, spec: EvalModelSpec) -> bool:
        """Whether the sample's rows are some that a subject was trained on."""
        return self.is_about(spec) and _trained_from(spec, self.model_set) is self.model_set.prepared

    def _general(self, eval_model: EvalModel) -> tuple[np.ndarray, np.ndarray] | None:
        """Nats and tokens of each general text."""
        if not (eval_model.spec is self.base or self.is_about(eval_model.spec)):
            return None
        tokenizer, texts = eval_model.rendered.tokenizer, [row.text for row in self.texts]
        names = [digest(list(tokenizer(text)["input_ids"])) for text in texts]

        def compute(missing: list[int], tell: Callable[[Mapping[int, Any]], None]) -> None:
            label = f"{eval_model.spec.name}: general texts"
            found = compute_text_losses(
                eval_model.model, tokenizer, [texts[at] for at in missing], eval_model.progress, label
            )
            tell({at: [float(nats), float(count)] for at, (nats, count) in enumerate(zip(*found, strict=True))})

        kept = open_cache("losses", eval_model.identity | {"texts": "general"}, eval_model.cache)
        values = np.array(get_or_compute(kept, names, compute), dtype=float)
        return values[:, 0], values[:, 1]

    def _trained_on(self, eval_model: EvalModel) -> np.ndarray | None:
        """Nats of each row of the sample."""
        if not self.sample or not (eval_model.spec is self.base or self.saw_sample(eval_model.spec)):
            return None
        return compute_losses(replace(eval_model, rendered=replace(eval_model.rendered, rows=self.sample)))


def create_examination(model_set: ModelSet, file: Path | None = None) -> Examination:
    """The examination of a lineup; `file`: general texts instead of the bundled ones.

    Raises:
        UserError: there is no base to compare with, nothing that was made from it, or the file has no texts.
    """
    base = next((spec for spec in model_set.specs if spec.kind == "base"), None)
    if base is None:
        raise UserError(
            "--diagnose: compares with the base model, which is none of these. Write the word base beside them, or one "
            "run alone."
        )
    try:
        return Examination(model_set, read_general_texts(file), base)
    except UserError as error:
        raise UserError(f"--general: {error}") from error


def _trained_from(spec: EvalModelSpec, model_set: ModelSet) -> Prepared | None:
    """What a subject was trained from, as far as it is known. The merged model of a run is given by the run."""
    if spec.prepared is None and model_set.run is not None and spec.given == str(model_set.run.folder):
        return model_set.prepared
    return spec.prepared


def diagnose_models(
    evaluation: Evaluation, examination: Examination | None, file: Path | None, progress: Progress
) -> dict[str, list[Finding]]:
    """The findings about each model but the base, by its name; a leak is one about the rows, under the name `data`.

    Without an examination they are those that ask nothing of the models besides their answers and losses.

    Args:
        file: where the rows were taken from, if not from the run.
    """
    found: dict[str, list[Finding]] = {}
    base = next((model for model in evaluation.models if model.spec.kind == "base"), None)
    indexes: dict[int, SpanIndex | None] = {}
    for model in evaluation.models:
        if model is base:
            continue
        trained = _trained_from(model.spec, evaluation.model_set)
        if model.answers and id(trained) not in indexes:
            indexes[id(trained)] = _training_answers(trained, progress)
        about = _of_answers(model, base, indexes.get(id(trained)), evaluation.settings)
        if examination is not None and base is not None:
            about += _of_losses(model, base, examination, evaluation.settings.seed)
        if about:
            found[model.name] = about
    for name, drifted in _drift(evaluation, base).items():
        found.setdefault(name, []).append(drifted)
    leaks = _leak(evaluation, progress) if file else None
    if leaks:
        found.setdefault("data", []).append(leaks)
    return found


def _training_answers(prepared: Prepared | None, progress: Progress) -> SpanIndex | None:
    """The answers that a model was trained on, to look for copies of them; None where they are not known."""
    train = prepared.rows.train_if_there if prepared else None
    if prepared is None or train is None:
        return None
    texts, stops = [], prepared.stop_ids
    with progress.bar("training answers", total=len(train.rows)) as bar:
        for row in train.rows:
            if row["answer"] >= 0:
                texts.append(reference_of(row, prepared.tokenizer, stops))
            bar.advance()
    return index_spans(texts) if texts else None


def _of_answers(
    model: ModelResult, base: ModelResult | None, index: SpanIndex | None, settings: EvalSettings
) -> list[Finding]:
    rendered = model.rendered
    if not model.answers:
        return []
    prompts = [str(rendered.tokenizer.decode(prompt)) for prompt in rendered.prompts]
    found = []
    if index is not None:
        others = base.answers if base and base.answers and len(base.answers) == len(model.answers) else None
        found.append(measure_parroting(model.answers, prompts, rendered.references, index, others, settings.seed))
    cut = [not said.ended for said in model.outputs.answers]
    longer = [length > settings.max_new_tokens for length in _reference_lengths(rendered)]
    return [*found, *measure_style(model.answers, rendered.references, prompts, cut, longer, settings.seed)]


def _reference_lengths(rendered: RenderedRows) -> list[int]:
    return [
        len(rendered.rows[number]["input_ids"]) - rendered.rows[number]["answer"] for number in rendered.with_answer
    ]


def _of_losses(model: ModelResult, base: ModelResult, examination: Examination, seed: int) -> list[Finding]:
    """What the models' losses on other rows say."""
    if not examination.is_about(model.spec):
        return []
    (base_nats, tokens), (nats, own) = base.outputs.probed[_GENERAL], model.outputs.probed[_GENERAL]
    if not np.array_equal(tokens, own):
        return [FORGETTING.unmeasured("its tokenizer cuts the texts into other tokens than the base's")]
    found = [measure_forgetting(base_nats, nats, tokens, [row.register for row in examination.texts], seed)]
    if examination.sample and examination.saw_sample(model.spec) and model.rendered is base.rendered:
        train = (base.outputs.probed[_TRAINED], model.outputs.probed[_TRAINED], trained_tokens(examination.sample))
        found.append(measure_memorization(train, (base.outputs.nats, model.outputs.nats, model.tokens), seed))
    return found


def _drift(evaluation: Evaluation, base: ModelResult | None) -> dict[str, Finding]:
    """Of an adapter that was scored on several quantizations of its base."""
    by_adapter: dict[Any, dict[str, ModelResult]] = {}
    for model in evaluation.models:
        if model.spec.adapter is not None:
            key = (model.spec.adapter, id(model.rendered))
            by_adapter.setdefault(key, {})[model.spec.settings.quantization] = model
    found: dict[str, Finding] = {}
    for models in (those for those in by_adapter.values() if len(those) > 1):
        full = models.get("none")
        if full is None:
            lacking = DRIFT.unmeasured("it was not scored on the full base: write none among --quantizations too")
            found |= {model.name: lacking for model in models.values()}
            continue
        nats = {name: model.outputs.nats for name, model in models.items()}
        alike = base is not None and base.rendered is full.rendered and base.spec.base_key == full.spec.base_key
        own = base.outputs.nats if base and alike else None
        drifted = measure_drift(nats, full.tokens, "none", own, evaluation.settings.seed)
        found |= {models[name].name: one for name, one in drifted.items()}
    return found


def _leak(evaluation: Evaluation, progress: Progress) -> Finding | None:
    """Rows of a file that the first run was trained on, as its tokenizer writes both."""
    prepared = evaluation.model_set.prepared
    train = prepared.rows.train_if_there if prepared else None
    if prepared is None or train is None:
        return None
    rendered = next(model.rendered for model in evaluation.models if model.spec.prepared is prepared)
    return measure_leak(*(_traits(rows, prepared, progress) for rows in (train.rows, rendered.rows)))


def _traits(rows: Any, prepared: Prepared, progress: Progress) -> RowStats:
    """The traits of rows as they are after rendering: what stands before the answer is the prompt."""
    tokenizer, stops, said = prepared.tokenizer, prepared.stop_ids, list[RowContent]()
    with progress.bar("looking for leaks", total=len(rows)) as bar:
        for row in rows:
            if row["answer"] < 0:
                said.append(Text(str(tokenizer.decode(row["input_ids"]))))
            else:
                prompt = str(tokenizer.decode(row["input_ids"][: row["answer"]]))
                answer = reference_of(row, tokenizer, stops)
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                said.append(Conversation(turns))
            bar.advance()
    return compute_row_stats(said, near=True, style=False)


def describe_flagged(found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What is flagged, a sentence each."""
    return [
        f"{name}: {describe_finding(one)}"
        for name, those in found.items()
        for one in those
        if one.flagged and one.value is not None
    ]
