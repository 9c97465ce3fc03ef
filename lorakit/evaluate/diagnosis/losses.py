"""What losses tell: forgetting on general texts, memorization of training rows, drift on quantized bases."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from lorakit.data.general_texts import encode_text
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.likelihood import row_losses, trained_tokens
from lorakit.evaluate.metric import Interval, Measure, compare, intervals, loss, ratio
from lorakit.model.tokenizer import pad_token_id
from lorakit.progress import Progress

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


def compute_text_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], progress: Progress, note: str = "general texts"
) -> tuple[np.ndarray, np.ndarray]:
    """The summed cross-entropy of each text (texts,) in nats, and its predicted tokens (texts,). Texts have no chat
    template, only the special tokens that the tokenizer sets in front of a document, and at most 1,024 tokens each. A
    text of a single token predicts nothing: 0 of both."""
    encoded = [encode_text(tokenizer, text, model.config) for text in texts]
    predicts = np.array([len(ids) > 1 for ids in encoded], bool)
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]
    nats, tokens = np.zeros((2, len(texts)))
    nats[predicts] = row_losses(model, rows, pad_token_id(tokenizer), note, progress)
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
    details["registers"] = {
        name: {"texts": one.rows, "difference": one.difference, "interval": _bounds(one.interval)}
        for name, one in by_register.items()
    }
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
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray],
    seed: int = 0,
) -> Finding:
    """How much of what the model learned on training rows it does not show on held-out rows. `train` (a sample of the
    training rows will do) and `held_out`: the summed nats of each row by the base model, those by the trained model,
    and its trained tokens."""
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
    for name, interval in bounds.items():
        details[f"{name} (nats)"] = {"value": measures[name].value, "interval": _bounds(interval)}
    if learned is None or share is None:
        return MEMORIZATION.unmeasured("there are too few rows for an interval", details)
    if learned.low <= 0:
        return MEMORIZATION.unmeasured("the model has not learned anything on its training rows", details)
    return MEMORIZATION.measured(measures["share"].value, share.low > MEMORIZATION.threshold, share, details)


def _bounds(interval: Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None
