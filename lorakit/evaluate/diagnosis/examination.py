"""What may have gone wrong with adapters: the findings of an evaluation, and what else they measure on the models.

Losses tell of forgetting on general texts, memorization of training rows, and drift on quantized bases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import block_diag

from lorakit.data.answers import reference_of, until_stop
from lorakit.data.general_texts import GeneralText, encode_text, read_general_texts
from lorakit.errors import UserError
from lorakit.evaluate.diagnosis import copying
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.diagnosis.gguf_findings import measure_gguf
from lorakit.evaluate.diagnosis.serving import add_server_findings
from lorakit.evaluate.diagnosis.style import measure_style
from lorakit.evaluate.diagnosis.support import measure_support
from lorakit.evaluate.forward import row_losses, trained_tokens
from lorakit.evaluate.inference import EvalModel, Save, compute_losses, forward_passes
from lorakit.evaluate.metric import Measure, compare, intervals, loss, ratio
from lorakit.evaluate.models import EvalModelSpec, ModelSet, have_same_weights
from lorakit.evaluate.rendering import Row
from lorakit.evaluate.served_answers import ServedAnswers
from lorakit.model.spec_from_meta import read_hf_config
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import GivenRows, Prepared
from lorakit.progress import Progress

if TYPE_CHECKING:
    from lorakit.evaluate.run import EvalSettings, Evaluation, ModelResult

# Training rows whose loss is compared with that of the held-out rows.
_SAMPLE = 200

FORGETTING = Finding(
    "forgetting",
    unit="nats per token more loss on general texts than the base model",
    threshold=0.5,
    why="At half a nat a token of general text is 40 % less likely than it was. Holding SmolLM2-135M in nf4, which "
    "is commonly accepted, costs about 0.28 on the bundled texts, and so does an adapter that does its task well; "
    "one trained at 15 times the learning rate costs 15.8. Flagged where the 95 % interval lies above 0.5.",
    remedy="Train with a lower learning rate, for fewer steps or with a lower rank; mix some general rows into the "
    "training (another source in data.train), and compare checkpoints.",
)
DRIFT = Finding(
    "quantization drift",
    unit="nats per token more loss with the quantized base than with the full one",
    threshold=0.1,
    why="At a tenth of a nat every trained token is 10 % less likely, and an answer of 20 tokens seven times less. "
    "Flagged where the 95 % interval of the paired difference lies above 0.1.",
    remedy="Quantize less (q8 instead of nf4), train on the quantized base that will be used (model.quantization), "
    "or merge onto the full weights and quantize the merged model.",
)
MEMORIZATION = Finding(
    "memorization",
    unit="share of the gain on training rows that held-out rows lack",
    threshold=0.5,
    why="The gain is by how much the loss is lower than the base model's, in nats per token. Where held-out rows "
    "gain less than half of what training rows gain, more of the training went into remembering rows than into the "
    "task. Flagged where the 95 % interval lies above one half.",
    remedy="Train for fewer epochs (train.early_stopping stops at the lowest held-out loss), with a lower rank, or "
    "on more rows. Check also that the held-out rows are of the same kind as the training rows.",
)


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
        train = prepared.rows.read_or_warn("train") if prepared else None
        if prepared is None or train is None or not have_same_weights(prepared.base, self.base.loaded[0]):
            return []
        numbers = np.unique(np.linspace(0, len(train.rows) - 1, min(_SAMPLE, len(train.rows))).astype(int))
        return [train.rows[int(number)] for number in numbers]

    def is_about(self, spec: EvalModelSpec) -> bool:
        """Whether a model was made from the base. An adapter on another quantization differs by that too."""
        if spec.adapter is not None:
            return spec.base_key == self.base.base_key
        trained = trained_from(spec, self.model_set)
        return trained is not None and have_same_weights(trained.base, self.base.loaded[0])

    def measure(self, eval_model: EvalModel) -> dict[str, np.ndarray]:
        """`nats` and `tokens` of each general text, nats of the `sample`; nothing of a model that it is not about."""
        spec, tokenizer, texts = eval_model.spec, eval_model.rendered.tokenizer, [row.text for row in self.texts]
        if spec is not self.base and not self.is_about(spec):
            return {}

        def work(model: Any, missing: list[int], save: Save) -> None:
            chosen, label = [texts[at] for at in missing], f"{spec.name}: general texts"
            config = read_hf_config(self.base.loaded[0].folder) if spec.gguf else model.config
            losses_of = forward_passes(spec).row_losses
            nats, tokens = compute_text_losses(model, tokenizer, chosen, eval_model.progress, label, config, losses_of)
            save(dict(enumerate(np.stack([nats, tokens], axis=1).tolist())))

        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
        values = np.array(eval_model.compute("losses", {"texts": "general"}, rows, work), dtype=float)
        measured = {"nats": values[:, 0], "tokens": values[:, 1]}
        saw_sample = trained_from(spec, self.model_set) is self.model_set.prepared
        if self.sample and (spec is self.base or saw_sample):
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


def trained_from(spec: EvalModelSpec, model_set: ModelSet) -> Prepared | None:
    """What a model was trained from, if that is known. The merged model of a run is given by the run."""
    if spec.prepared is None and model_set.run is not None and spec.given == str(model_set.run.folder):
        return model_set.prepared
    return spec.prepared


def diagnose_models(
    evaluation: "Evaluation", examination: Examination | None, file: Path | GivenRows | None, progress: Progress
) -> dict[str, list[Finding]]:
    """The findings about each model but the base, prompted or not, by its name; what is about the rows, such as a
    leak, is under `data`. Without an examination they are those of answers and held-out losses. `file`: of the rows, if
    they are not the run's."""
    base = next((model for model in evaluation.models if model.spec.kind == "base"), None)
    findings, indexes = _drift_findings(evaluation, base), dict[int, copying.SpanIndex | None]()
    prepared, support = evaluation.model_set.prepared, None
    for model in evaluation.models:
        if model.spec.prompting is not None:  # the base, which nothing was trained from
            continue
        of_model = []
        if model is not base and model.answers:
            trained = trained_from(model.spec, evaluation.model_set)
            if id(trained) not in indexes:
                texts = _training_answers(trained, progress)
                indexes[id(trained)] = copying.index_spans(texts) if texts else None
                support = measure_support(model.rendered, texts) if trained is prepared else support
            of_model += _answer_findings(model, base, indexes[id(trained)], evaluation.settings)
        if model.spec.gguf:
            of_model += measure_gguf(model, evaluation.model_set, file)
        if isinstance(model.examined, ServedAnswers):
            of_model = add_server_findings(of_model, model.examined, model.rendered, evaluation.model_set)
        if model is not base and base is not None and examination is not None and examination.is_about(model.spec):
            of_model += _loss_findings(model, base, examination, evaluation.settings.seed)
        findings[model.name] = [*of_model, *findings.pop(model.name, [])]
    if support:
        findings["data"] = [support]
    train = prepared.rows.read_or_warn("train") if prepared else None
    if file and prepared and train is not None:
        # As the first run's tokenizer renders both.
        rendered = next(model.rendered for model in evaluation.models if model.spec.prepared is prepared)
        stats = [copying.rendered_row_stats(rows, prepared, progress) for rows in (train.rows, rendered.rows)]
        findings.setdefault("data", []).append(copying.measure_leak(*stats))
    return {name: of_model for name, of_model in findings.items() if of_model}


def _training_answers(prepared: Prepared | None, progress: Progress) -> list[str]:
    """The answers that a model was trained on; none if they are not known."""
    train = prepared.rows.read_or_warn("train") if prepared else None
    if prepared is None or train is None:
        return []
    texts = []
    with progress.bar("training answers", total=len(train.rows)) as bar:
        for row in train.rows:
            if row["answer"] >= 0:
                texts.append(reference_of(row, prepared.tokenizer, prepared.stop_ids))
            bar.advance()
    return texts


def _answer_findings(
    model: "ModelResult", base: "ModelResult | None", index: copying.SpanIndex | None, settings: "EvalSettings"
) -> list[Finding]:
    rendered, answers, seed = model.rendered, model.answers, settings.seed
    prompts, findings = [str(rendered.tokenizer.decode(prompt)) for prompt in rendered.prompts], []
    if index is not None:
        of_base = base.answers if base and len(base.answers) == len(answers) else None
        findings.append(copying.measure_parroting(answers, prompts, rendered.references, index, of_base, seed))
    cut = [not ended for ended in model.ended]
    tails = (rendered.rows[number]["input_ids"][start:] for number, start in rendered.answers)
    # With the token that ends an answer.
    longer = [len(until_stop(tail, rendered.stop_ids)) + 1 > settings.max_new_tokens for tail in tails]
    return [*findings, *measure_style(answers, rendered.references, prompts, cut, longer, seed)]


def _loss_findings(model: "ModelResult", base: "ModelResult", examination: Examination, seed: int) -> list[Finding]:
    before, after = base.examined, model.examined
    if not np.array_equal(before["tokens"], after["tokens"]):
        return [FORGETTING.unmeasured("its tokenizer splits the texts into other tokens than the base's")]
    registers = [row.register for row in examination.texts]
    findings = [measure_forgetting(before["nats"], after["nats"], after["tokens"], registers, seed)]
    if "sample" in after and model.rendered is base.rendered:
        train = (before["sample"], after["sample"], trained_tokens(examination.sample))
        findings.append(measure_memorization(train, (base.nats, model.nats, model.tokens), seed))
    return findings


def _drift_findings(evaluation: "Evaluation", base: "ModelResult | None") -> dict[str, list[Finding]]:
    """By model, for each adapter that was scored on several quantizations of its base."""
    by_adapter: dict[Any, dict[str, ModelResult]] = {}
    for model in evaluation.models:
        if model.spec.adapter is not None:
            key = (model.spec.adapter, id(model.rendered))
            by_adapter.setdefault(key, {})[model.spec.loaded[1].quantization] = model
    findings: dict[str, list[Finding]] = {}
    for models in (models for models in by_adapter.values() if len(models) > 1):
        full = models.get("none")
        if full is None:
            unmeasured = DRIFT.unmeasured("it was not scored on the full base: add none to --quantizations")
            findings |= {model.name: [unmeasured] for model in models.values()}
            continue
        nats = {word: model.nats for word, model in models.items()}
        alike = base is not None and base.rendered is full.rendered and base.spec.base_key == full.spec.base_key
        base_nats = base.nats if base and alike else None
        drift = measure_drift(nats, full.tokens, base_nats, evaluation.settings.seed)
        findings |= {models[word].name: [finding] for word, finding in drift.items()}
    return findings


def compute_text_losses(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    progress: Progress,
    note: str = "general texts",
    config: Any = None,
    losses_of: Callable[..., np.ndarray] = row_losses,
) -> tuple[np.ndarray, np.ndarray]:
    """The summed cross-entropy of each text (texts,) in nats, and its predicted tokens (texts,). Texts have no chat
    template, only the special tokens that the tokenizer sets in front of a document, and at most 1,024 tokens each. A
    text of a single token predicts nothing: 0 of both. `config`: that of the model by default."""
    encoded = [encode_text(tokenizer, text, config or model.config) for text in texts]
    predicts = np.array([len(ids) > 1 for ids in encoded], bool)
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]
    nats, tokens = np.zeros((2, len(texts)))
    nats[predicts] = losses_of(model, rows, pad_token_id(tokenizer), note, progress)
    tokens[predicts] = trained_tokens(rows)
    return nats, tokens


def measure_forgetting(
    base_nats: np.ndarray, tuned_nats: np.ndarray, tokens: np.ndarray, registers: Sequence[str], seed: int = 0
) -> Finding:
    """How much worse the trained model predicts general texts than its base. `base_nats`, `tuned_nats`, `tokens`
    (texts,): of `compute_text_losses`; `registers`: of `GeneralText`. The details have the difference of each register,
    with an interval where there are six texts of it."""
    of_text = np.array(registers, dtype=object)
    masks = {"": np.ones(len(of_text))}
    masks |= {name: (of_text == name).astype(float) for name in dict.fromkeys(registers) if name}
    base, tuned = (
        {name: loss(nats * mask, tokens * mask) for name, mask in masks.items()} for nats in (base_nats, tuned_nats)
    )
    by_register = compare(base, tuned, seed)
    every = by_register.pop("")
    details: dict[str, Any] = {"texts": len(of_text), "tokens": int(tokens.sum())}
    details |= {"loss of base": every.first, "loss of trained": every.second}
    details["registers"] = {}
    for name, one in by_register.items():
        bounds = one.interval and [one.interval.low, one.interval.high]
        details["registers"][name] = {"texts": one.rows, "difference": one.difference, "interval": bounds}
    return FORGETTING.difference(every, details)


def measure_drift(
    nats: Mapping[str, np.ndarray], tokens: np.ndarray, base_nats: np.ndarray | None = None, seed: int = 0
) -> dict[str, Finding]:
    """A finding for each quantization of the base under the same adapter, against the full base. `nats`: by
    quantization (none and other words of model.quantization), each row's summed nats (rows,). `base_nats`: those of the
    full base without the adapter, for the share of the adapter's gain that is lost."""
    reference = loss(nats["none"], tokens)
    findings = {}
    for name in (word for word in nats if word != "none"):
        compared = compare({"": reference}, {"": loss(nats[name], tokens)}, seed)[""]
        details: dict[str, Any] = {"rows": len(tokens), "quantization": name}
        details |= {"loss of none": compared.first, f"loss of {name}": compared.second}
        if base_nats is not None:
            gain = loss(base_nats, tokens).value - reference.value
            details["gain of the adapter (nats)"] = gain
            details["share of the gain lost"] = compared.difference / gain if gain > 0 else None
        findings[name] = DRIFT.difference(compared, details)
    return findings


def measure_memorization(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int = 0
) -> Finding:
    """How much of what the model learned on training rows it does not show on held-out rows. `train` (a sample will do)
    and `held_out`: each row's summed nats by the base model, those by the trained model, and its trained tokens."""
    # (all rows, 4): nats and tokens of training rows, then those of held-out rows.
    gains = block_diag(*(np.stack([base - tuned, tokens], axis=1) for base, tuned, tokens in (train, held_out)))
    losses = block_diag(*(np.stack([tuned, tokens], axis=1) for _, tuned, tokens in (train, held_out)))

    def share_lacking(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(1 - ratio(sums[..., 2:]) / ratio(sums[..., :2]))

    measures = {
        "learned on training rows": Measure(gains, lambda sums: ratio(sums[..., :2]), "nats"),
        "learned on held-out rows": Measure(gains, lambda sums: ratio(sums[..., 2:]), "nats"),
        "gap": Measure(losses, lambda sums: ratio(sums[..., 2:]) - ratio(sums[..., :2]), "nats", higher=False),
        "share": Measure(gains, share_lacking, "share", higher=False),
    }
    bounds = intervals(measures, seed)
    learned, share = bounds["learned on training rows"], bounds.pop("share")
    details: dict[str, Any] = {"training rows": len(train[0]), "held-out rows": len(held_out[0])}
    for name, one in bounds.items():
        details[f"{name} (nats)"] = {"value": measures[name].value, "interval": one and [one.low, one.high]}
    if learned is None or share is None:
        return MEMORIZATION.unmeasured("there are too few rows for an interval", details)
    if learned.low <= 0:
        return MEMORIZATION.unmeasured("the model has not learned anything on its training rows", details)
    return MEMORIZATION.measured(measures["share"].value, share.low > MEMORIZATION.threshold, share, details)
