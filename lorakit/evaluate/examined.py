"""What may have gone wrong with adapters: the findings of an evaluation, and what they ask of the models besides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.evaluate.asked import Asked, reference_of
from lorakit.evaluate.asking import Probe, Witness, losses_of
from lorakit.evaluate.cached import by_content, opened, prompt_name
from lorakit.evaluate.diagnosis.collapse import style
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.diagnosis.general import general_rows, text_losses
from lorakit.evaluate.diagnosis.leak import LEAK, leak
from lorakit.evaluate.diagnosis.losses import forgetting, quantization_drift
from lorakit.evaluate.diagnosis.parroting import memorization, parroting
from lorakit.evaluate.diagnosis.spans import SpanIndex, span_index
from lorakit.evaluate.evaluation import Evaluation
from lorakit.evaluate.losses import trained_tokens
from lorakit.evaluate.scored import Scored
from lorakit.evaluate.subjects import Lineup
from lorakit.progress import Progress

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200
_GENERAL, _TRAINED = "general", "trained on"


@dataclass(frozen=True)
class Examination:
    """What is looked for. `general`: a file of general texts instead of the bundled ones."""

    lineup: Lineup
    general: Path | None = None

    @cached_property
    def texts(self) -> list[Any]:
        """The general texts."""
        return general_rows(self.general)

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Some training rows of the run, evenly out of all."""
        if self.lineup.prepared is None:
            return []
        rows = self.lineup.prepared.train.rows
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int))
        return [rows[int(number)] for number in chosen]

    @property
    def probes(self) -> dict[str, Probe]:
        """What is asked of every model while it is in memory."""
        found: dict[str, Probe] = {_GENERAL: self._general}
        if self.sample:
            found[_TRAINED] = self._trained_on
        return found

    def _general(self, witness: Witness) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of each general text."""
        tokenizer, texts = witness.asked.tokenizer, [row.text for row in self.texts]
        names = [prompt_name(tokenizer(text)["input_ids"]) for text in texts]

        def compute(missing: list[int], tell: Callable[[Mapping[int, Any]], None]) -> None:
            label = f"{witness.subject.name}: general texts"
            found = text_losses(witness.model, tokenizer, [texts[at] for at in missing], witness.progress, label)
            tell({at: [float(nats), float(count)] for at, nats, count in zip(missing, *found, strict=True)})

        kept = opened("losses", witness.facts | {"texts": "general"}, witness.cache)
        values = np.array(by_content(kept, names, compute), dtype=float)
        return values[:, 0], values[:, 1]

    def _trained_on(self, witness: Witness) -> np.ndarray:
        """Nats of each row of the sample."""
        return losses_of(replace(witness, asked=replace(witness.asked, rows=self.sample)))


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
    index = _training_answers(evaluation.lineup, progress) if any(one.answers for one in evaluation.models) else None
    for model in evaluation.models:
        if model is base:
            continue
        about = _of_answers(model, base, index, evaluation.request)
        if examination is not None and base is not None:
            about += _of_losses(model, base, examination, evaluation.request.seed)
        if about:
            found[model.name] = about
    for name, drifted in _drift(evaluation, base).items():
        found.setdefault(name, []).append(drifted)
    leaks = _leak(evaluation) if file else None
    if leaks:
        found["data"] = [leaks]
    return found


def _training_answers(lineup: Lineup, progress: Progress) -> SpanIndex | None:
    """The answers that the run was trained on, to look for copies of them."""
    prepared = lineup.prepared
    if prepared is None:
        return None
    texts = []
    with progress.bar("training answers", total=len(prepared.train.rows)) as bar:
        for row in prepared.train.rows:
            if row["answer"] >= 0:
                texts.append(reference_of(row, prepared.tokenizer, prepared.stop_ids))
            bar.advance()
    return span_index(texts) if texts else None


def _of_answers(model: Scored, base: Scored | None, index: SpanIndex | None, request: Any) -> list[Finding]:
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
    """What the models' losses on other rows say; only of models that cut texts into the same tokens as the base."""
    (base_nats, tokens), (nats, own) = base.found.probed[_GENERAL], model.found.probed[_GENERAL]
    if not np.array_equal(tokens, own):
        return []
    found = [forgetting(base_nats, nats, tokens, [row.register for row in examination.texts], seed)]
    if _TRAINED in model.found.probed and model.asked is base.asked:
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
    for models in by_adapter.values():
        if "none" not in models or len(models) < 2:
            continue
        nats = {name: model.found.nats for name, model in models.items()}
        full = models["none"]
        own = base.found.nats if base and base.subject.settings.quantization == "none" else None
        drifted = quantization_drift(nats, full.tokens, "none", own, evaluation.request.seed)
        found |= {models[name].name: one for name, one in drifted.items()}
    return found


def _leak(evaluation: Evaluation) -> Finding | None:
    """Rows of a file that the run was trained on."""
    prepared, asked = evaluation.lineup.prepared, evaluation.models[0].asked
    if prepared is None:
        return None
    if prepared.train.traits is None or asked.traits is None:
        return LEAK.unmeasured("the recipe's checks of rows are off (data.clean)")
    return leak(prepared.train.traits, asked.traits)


def flagged(found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What is flagged, a sentence each."""
    return [
        f"{name}: {one.name}: {one.value:.3g} {one.unit}. {one.remedy}"
        for name, those in found.items()
        for one in those
        if one.flagged and one.value is not None
    ]
