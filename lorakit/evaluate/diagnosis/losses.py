"""Forgetting and quantization drift: paired differences of losses on the same texts or rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.intervals import Comparison, compare
from lorakit.evaluate.metric import loss

FORGETTING = Check(
    "forgetting",
    "nats a token by which the loss on general text is higher than the base model's",
    0.5,
    "At half a nat a token of general text is 40 % less likely than it was. Holding SmolLM2-135M in nf4, which is "
    "commonly accepted, costs about 0.28 on the bundled texts, and so does an adapter that does its task well; one "
    "trained at 15 times the learning rate costs 15.8. Flagged where the 95 % interval lies above 0.5.",
    "Train with a lower learning rate, for fewer steps or with a lower rank; mix some general rows into the training "
    "(a further source in data.train), and compare checkpoints.",
)
DRIFT = Check(
    "quantization drift",
    "nats a token by which the loss with the quantized base is higher than with the full one",
    0.1,
    "At a tenth of a nat every trained token is 10 % less likely, and an answer of 20 tokens seven times less. "
    "Flagged where the 95 % interval of the paired difference lies above 0.1.",
    "Quantize less (q8 instead of nf4), train on the quantized base that will be used (model.quantization), or merge "
    "onto the full weights and quantize the merged model.",
)


def measure_forgetting(
    base_nats: np.ndarray, tuned_nats: np.ndarray, tokens: np.ndarray, registers: Sequence[str], seed: int = 0
) -> Finding:
    """How much worse the trained model predicts general texts than its base.

    `base_nats`, `tuned_nats`, `tokens` (texts,): of `compute_text_losses`; `registers`: of `GeneralText`. The details
    have the difference of each register, with an interval where there are six texts of it.
    """
    names = dict.fromkeys(registers)
    kinds = np.array(registers, dtype=object)
    chosen = {"": np.ones(len(kinds)), **{f"register {name}": (kinds == name).astype(float) for name in names if name}}
    base, tuned = (
        {name: loss(nats * mask, tokens * mask) for name, mask in chosen.items()} for nats in (base_nats, tuned_nats)
    )
    compared = compare(base, tuned, seed)
    whole = compared.pop("")
    details: dict[str, Any] = {"texts": len(kinds), "tokens": int(tokens.sum()), **_both(whole, "base", "trained")}
    details["registers"] = {name.removeprefix("register "): _difference(found) for name, found in compared.items()}
    return _higher(FORGETTING, whole, details)


def measure_drift(
    nats: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    full: str = "none",
    base_nats: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Finding]:
    """A finding for each quantization of the base under the same adapter, against the full base.

    `nats`: by quantization (a word of model.quantization), each row's summed nats (rows,); `full` names the one to
    compare with. `base_nats`: those of the full base without the adapter, by which the details state what share of the
    adapter's gain is lost.
    """
    reference = loss(nats[full], tokens)
    found = {}
    for name, summed in nats.items():
        if name == full:
            continue
        whole = compare({"": reference}, {"": loss(summed, tokens)}, seed)[""]
        details = {"rows": len(tokens), "quantization": name, **_both(whole, full, name)}
        if base_nats is not None:
            gain = loss(base_nats, tokens).value - reference.value
            details |= {"gain of the adapter (nats)": gain, "share of the gain lost": _over(whole.difference, gain)}
        found[name] = _higher(DRIFT, whole, details)
    return found


def _higher(check: Check, compared: Comparison, details: dict[str, Any]) -> Finding:
    flagged = compared.interval is not None and compared.interval.low > check.threshold
    return check.measured(compared.difference, flagged, compared.interval, details)


def _both(compared: Comparison, first: str, second: str) -> dict[str, float]:
    return {f"loss of {first}": compared.first, f"loss of {second}": compared.second}


def _difference(compared: Comparison) -> dict[str, Any]:
    interval = compared.interval
    return {
        "texts": compared.rows,
        "difference": compared.difference,
        "interval": interval and [interval.low, interval.high],
    }


def _over(difference: float, gain: float) -> float | None:
    """The share of a gain; None where there is no gain."""
    return difference / gain if gain > 0 else None
