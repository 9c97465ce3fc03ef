"""What may have gone wrong with adapters: the findings of an evaluation, and what they ask of the models besides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.conversations import Conversation, Said, Text
from lorakit.data.general_texts import GeneralText, general_rows
from lorakit.data.hygiene.traits import TraitArrays, traits
from lorakit.errors import UserError
from lorakit.evaluate.asked import Asked, reference_of
from lorakit.evaluate.asking import Probe, Witness, losses_of
from lorakit.evaluate.cached import by_content, opened, prompt_name
from lorakit.evaluate.diagnosis.collapse import style
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.diagnosis.general import text_losses
from lorakit.evaluate.diagnosis.leak import leak
from lorakit.evaluate.diagnosis.losses import DRIFT, FORGETTING, forgetting, quantization_drift
from lorakit.evaluate.diagnosis.parroting import memorization, parroting
from lorakit.evaluate.diagnosis.sentences import sentence
from lorakit.evaluate.diagnosis.spans import SpanIndex, span_index
from lorakit.evaluate.evaluation import Evaluation, Request
from lorakit.evaluate.losses import trained_tokens
from lorakit.evaluate.scored import Scored
from lorakit.evaluate.subjects import Lineup, Subject, weights_of
from lorakit.prepare import Prepared
from lorakit.progress import Progress

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200
_GENERAL, _TRAINED = "general", "trained on"


@dataclass(frozen=True, eq=False)
class Examination:
    """What is looked for. `texts` are general ones; `base` is the subject that the others are compared with."""

    lineup: Lineup
    texts: list[GeneralText]
    base: Subject

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Some training rows of the first run, evenly out of all; none where the base is that of another model."""
        prepared = self.lineup.prepared
        if prepared is None or weights_of(prepared.base) != weights_of(self.base.base):
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
        asked: dict[str, Probe] = {_GENERAL: self._general, _TRAINED: self._trained_on}
        return asked

    def is_about(self, subject: Subject) -> bool:
        """Whether a subject was made from the base. An adapter on another quantization differs by that too."""
        if subject.adapter is not None:
            return subject.held == self.base.held
        trained = _trained_from(subject, self.lineup)
        return trained is not None and weights_of(trained.base) == weights_of(self.base.base)

    def saw_sample(self, subject: Subject) -> bool:
        """Whether the sample's rows are some that a subject was trained on."""
        return self.is_about(subject) and _trained_from(subject, self.lineup) is self.lineup.prepared

    def _general(self, witness: Witness) -> tuple[np.ndarray, np.ndarray] | None:
        """Nats and tokens of each general text."""
        if not (witness.subject is self.base or self.is_about(witness.subject)):
            return None
        tokenizer, texts = witness.asked.tokenizer, [row.text for row in self.texts]
        names = [prompt_name(tokenizer(text)["input_ids"]) for text in texts]

        def compute(missing: list[int], tell: Callable[[Mapping[int, Any]], None]) -> None:
            label = f"{witness.subject.name}: general texts"
            found = text_losses(witness.model, tokenizer, [texts[at] for at in missing], witness.progress, label)
            tell({at: [float(nats), float(count)] for at, nats, count in zip(missing, *found, strict=True)})

        kept = opened("losses", witness.facts | {"texts": "general"}, witness.cache)
        values = np.array(by_content(kept, names, compute), dtype=float)
        return values[:, 0], values[:, 1]

    def _trained_on(self, witness: Witness) -> np.ndarray | None:
        """Nats of each row of the sample."""
        if not self.sample or not (witness.subject is self.base or self.saw_sample(witness.subject)):
            return None
        return losses_of(replace(witness, asked=replace(witness.asked, rows=self.sample)))


def examination(lineup: Lineup, file: Path | None = None) -> Examination:
    """The examination of a lineup; `file`: general texts instead of the bundled ones.

    Raises:
        UserError: there is no base to compare with, nothing that was made from it, or the file has no texts.
    """
    base = next((subject for subject in lineup.subjects if subject.kind == "base"), None)
    if base is None:
        raise UserError(
            "--diagnose: compares with the base model, which is none of these. Write the word base beside them, or one "
            "run alone."
        )
    try:
        return Examination(lineup, general_rows(file), base)
    except UserError as error:
        raise UserError(f"--general: {error}") from error


def _trained_from(subject: Subject, lineup: Lineup) -> Prepared | None:
    """What a subject was trained from, as far as it is known. The merged model of a run is given by the run."""
    if subject.prepared is None and lineup.run is not None and subject.given == str(lineup.run.folder):
        return lineup.prepared
    return subject.prepared


def findings(
    evaluation: Evaluation, examination: Examination | None, file: Path | None, progress: Progress
) -> dict[str, list[Finding]]:
    """The findings about each model but the base, by its name; a leak is one about the rows, under the name `data`.

    Without an examination they are those that ask nothing of the models besides their answers and losses.

    Args:
        file: where the rows were taken from, if not from the run.
    """
    found: dict[str, list[Finding]] = {}
    base = next((model for model in evaluation.models if model.subject.kind == "base"), None)
    indexes: dict[int, SpanIndex | None] = {}
    for model in evaluation.models:
        if model is base:
            continue
        trained = _trained_from(model.subject, evaluation.lineup)
        if model.answers and id(trained) not in indexes:
            indexes[id(trained)] = _training_answers(trained, progress)
        about = _of_answers(model, base, indexes.get(id(trained)), evaluation.request)
        if examination is not None and base is not None:
            about += _of_losses(model, base, examination, evaluation.request.seed)
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
    return span_index(texts) if texts else None


def _of_answers(model: Scored, base: Scored | None, index: SpanIndex | None, request: Request) -> list[Finding]:
    asked = model.asked
    if not model.answers:
        return []
    prompts = [str(asked.tokenizer.decode(prompt)) for prompt in asked.prompts]
    found = []
    if index is not None:
        others = base.answers if base and base.answers and len(base.answers) == len(model.answers) else None
        found.append(parroting(model.answers, prompts, asked.references, index, others, request.seed))
    cut = [not said.ended for said in model.found.said]
    longer = [length > request.max_new_tokens for length in _reference_lengths(asked)]
    return [*found, *style(model.answers, asked.references, prompts, cut, longer, request.seed)]


def _reference_lengths(asked: Asked) -> list[int]:
    return [len(asked.rows[number]["input_ids"]) - asked.rows[number]["answer"] for number in asked.with_answer]


def _of_losses(model: Scored, base: Scored, examination: Examination, seed: int) -> list[Finding]:
    """What the models' losses on other rows say."""
    if not examination.is_about(model.subject):
        return []
    (base_nats, tokens), (nats, own) = base.found.probed[_GENERAL], model.found.probed[_GENERAL]
    if not np.array_equal(tokens, own):
        return [FORGETTING.unmeasured("its tokenizer cuts the texts into other tokens than the base's")]
    found = [forgetting(base_nats, nats, tokens, [row.register for row in examination.texts], seed)]
    if examination.sample and examination.saw_sample(model.subject) and model.asked is base.asked:
        train = (base.found.probed[_TRAINED], model.found.probed[_TRAINED], trained_tokens(examination.sample))
        found.append(memorization(train, (base.found.nats, model.found.nats, model.tokens), seed))
    return found


def _drift(evaluation: Evaluation, base: Scored | None) -> dict[str, Finding]:
    """Of an adapter that was scored on several quantizations of its base."""
    by_adapter: dict[Any, dict[str, Scored]] = {}
    for model in evaluation.models:
        if model.subject.adapter is not None:
            key = (model.subject.adapter, id(model.asked))
            by_adapter.setdefault(key, {})[model.subject.settings.quantization] = model
    found: dict[str, Finding] = {}
    for models in (those for those in by_adapter.values() if len(those) > 1):
        full = models.get("none")
        if full is None:
            lacking = DRIFT.unmeasured("it was not scored on the full base: write none among --quantizations too")
            found |= {model.name: lacking for model in models.values()}
            continue
        nats = {name: model.found.nats for name, model in models.items()}
        alike = base is not None and base.asked is full.asked and base.subject.held == full.subject.held
        own = base.found.nats if base and alike else None
        drifted = quantization_drift(nats, full.tokens, "none", own, evaluation.request.seed)
        found |= {models[name].name: one for name, one in drifted.items()}
    return found


def _leak(evaluation: Evaluation, progress: Progress) -> Finding | None:
    """Rows of a file that the first run was trained on, as its tokenizer writes both."""
    prepared = evaluation.lineup.prepared
    train = prepared.rows.train_if_there if prepared else None
    if prepared is None or train is None:
        return None
    asked = next(model.asked for model in evaluation.models if model.subject.prepared is prepared)
    return leak(*(_traits(rows, prepared, progress) for rows in (train.rows, asked.rows)))


def _traits(rows: Any, prepared: Prepared, progress: Progress) -> TraitArrays:
    """The traits of rows as they are after rendering: what stands before the answer is the prompt."""
    tokenizer, stops, said = prepared.tokenizer, prepared.stop_ids, list[Said]()
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
    return traits(said, near=True, style=False)


def flagged(found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What is flagged, a sentence each."""
    return [
        f"{name}: {sentence(one)}"
        for name, those in found.items()
        for one in those
        if one.flagged and one.value is not None
    ]
