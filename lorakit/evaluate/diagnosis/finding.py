"""A finding: one thing that may have gone wrong, as a number with a threshold, and as a sentence."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from lorakit.amounts import percent
from lorakit.evaluate.metric import Comparison, Interval
from lorakit.recipe.problem import one_line


@dataclass(frozen=True)
class Finding:
    """One number about a model, and whether it is a reason for concern. Each kind is a constant that is not measured
    yet. `value` and `threshold` are in the words of `unit`; without a value `details["unmeasured"]` says why. `why`:
    the reason for the threshold and the rule for `flagged`; `remedy`: what to try. `details`: plain JSON values."""

    name: str
    value: float | None = None
    _: KW_ONLY
    unit: str
    threshold: float
    flagged: bool = False
    why: str
    remedy: str
    interval: Interval | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def measured(self, value: float, flagged: bool, interval: Interval | None, details: dict[str, Any]) -> "Finding":
        """The finding of a value; NaN is not measured."""
        if math.isnan(value):
            return self.unmeasured("no row has a number", details)
        return replace(self, value=float(value), flagged=bool(flagged), interval=interval, details=details)

    def difference(self, compared: Comparison, details: dict[str, Any]) -> "Finding":
        """The finding of a difference, flagged where its interval lies above the threshold."""
        flagged = compared.interval is not None and compared.interval.low > self.threshold
        return self.measured(compared.difference, flagged, compared.interval, details)

    def unmeasured(self, reason: str, details: dict[str, Any] | None = None) -> "Finding":
        return replace(self, details={"unmeasured": reason, **(details or {})})


def format_number(value: float) -> str:
    """Three digits that count; nothing smaller than a thousandth."""
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.3f}".replace("-0.000", "0.000")


def _with_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({percent(share)})" for name, share in shares.items())


def describe_finding(finding: Finding) -> str:
    """What was measured and what to do about it, as one sentence each."""
    value, threshold, details = finding.value, finding.threshold, finding.details
    assert value is not None
    match finding.name:
        case "answer length":
            direction = "shorter" if details["answers over references"] < 1 else "longer"
            text = f"the answers are {format_number(value)} times {direction} than the references"
        case "unfinished answers":
            cut, longer = percent(details["answers cut"]), percent(details["references longer"])
            text = f"{cut} of the answers hit max_new_tokens, and {longer} of the references are longer"
        case "variety of answers":
            frequent = {f"'{one_line(one['text'])}'": one["share"] for one in details["most frequent answers"]}
            text = f"the answers are nearly all the same (variety {abs(value):.2f}, expected at least {threshold:g}); "
            text += f"the most frequent: {_with_shares(frequent)}"
        case "format":
            ours, theirs = (_with_shares(details[f"formats of {texts}"]) for texts in ("answers", "references"))
            text = f"the answers begin with {ours}, the references with {theirs}"
        case "vocabulary":
            text = f"vocabulary: {format_number(value)} {finding.unit} (expected at least {threshold:g})"
        case _ if "in words" in details:
            text = str(details["in words"])
        case _ if finding.unit.startswith("share of"):
            amount = percent(value) + finding.unit.removeprefix("share")
            text = f"{finding.name}: {amount} (expected at most {percent(threshold)})"
        case _:
            text = f"{finding.name}: {format_number(value)} {finding.unit} (expected at most {threshold:g})"
    return f"{text}. {finding.remedy}"
