"""A finding: one thing that may have gone wrong, as a number beside the one from which on it should be looked at."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.evaluate.intervals import Interval


@dataclass(frozen=True)
class Finding:
    """One number about a model, and whether it is a reason for concern.

    `value` in the words of `unit`; None where it cannot be measured, which `details["unmeasured"]` explains.
    `interval` is that of `value`, None where there is none. `threshold` in the same unit, and `why` the reason for it
    and the rule by which `flagged` follows from both. `remedy`: what to try. `details` are JSON's kinds of values only.
    """

    name: str
    value: float | None
    unit: str
    threshold: float
    flagged: bool
    why: str
    remedy: str
    interval: Interval | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """What all findings of one name share."""

    name: str
    unit: str
    threshold: float
    why: str
    remedy: str

    def measured(self, value: float, flagged: bool, interval: Interval | None, details: dict[str, Any]) -> Finding:
        """The finding of a measured value; NaN is none."""
        if math.isnan(value):
            return self.unmeasured("no row has a number", details)
        return self._finding(float(value), bool(flagged), interval, details)

    def unmeasured(self, reason: str, details: dict[str, Any] | None = None) -> Finding:
        """The finding that there is nothing to measure."""
        return self._finding(None, False, None, {"unmeasured": reason, **(details or {})})

    def _finding(
        self, value: float | None, flagged: bool, interval: Interval | None, details: dict[str, Any]
    ) -> Finding:
        return Finding(self.name, value, self.unit, self.threshold, flagged, self.why, self.remedy, interval, details)
