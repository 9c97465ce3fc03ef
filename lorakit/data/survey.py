"""The survey of a recipe's rows, for `lorakit data`: sizes, lengths, padding and what the checks found."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of
from lorakit.data.lengths import Limit, Padding, histogram, limits, padding, quantiles
from lorakit.data.report import ReasonCounts, Report
from lorakit.progress import Progress
from lorakit.recipe.schema import Data


@dataclass(frozen=True)
class Survey:
    """The rows of a recipe. `lengths`, `bins` and `limits` are of every text that can be encoded, fitting or not.

    `actions` and `findings`: what each check of `data.clean` does, and what it found.
    """

    train: Examples
    held_out: Examples | None
    lengths: dict[str, int]
    bins: list[tuple[int, int, int]]
    limits: list[Limit]
    padding: Padding
    actions: dict[str, str]
    findings: dict[str, ReasonCounts]

    @property
    def stopping(self) -> list[str]:
        """The checks that would stop a run at what they found."""
        return [check for check, action in self.actions.items() if action == "error" and self.findings[check].total]

    @property
    def reports(self) -> dict[str, Report]:
        sides = {"train": self.train, "held-out": self.held_out}
        return {name: examples.report for name, examples in sides.items() if examples}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            **{name.replace("-", "_"): report.to_dict() for name, report in self.reports.items()},
            "lengths": self.lengths,
            "histogram": [{"from": first, "to": last, "texts": count} for first, last, count in self.bins],
            "max_lengths": [asdict(limit) for limit in self.limits],
            "padding": asdict(self.padding),
            "checks": {
                check: {
                    "name": check,
                    "action": self.actions[check],
                    "found": findings.counts,
                    "first": findings.first,
                    "rows": findings.total,
                }
                for check, findings in self.findings.items()
            },
        }


def survey(
    settings: Data, template: ChatTemplate, batch_size: int, seed: int, attention_at: float, progress: Progress
) -> Survey:
    """Read, render and check every row that a recipe names; raises as `examples_of`.

    `attention_at`: the length in tokens at which the model's attention costs as much as its matrix products. A check
    whose action is `error` reports here: the whole is to be seen (`stopping`).
    """
    reporting = {check: "report" for check, action in settings.clean.model_dump().items() if action == "error"}
    looking = settings.model_copy(update={"clean": settings.clean.model_copy(update=reporting)})
    train, held_out = examples_of(looking, template, progress, survey=True)
    texts = train.text_lengths
    assert texts is not None
    return Survey(
        train=train,
        held_out=held_out,
        lengths=quantiles(texts.length),
        bins=histogram(texts.length),
        limits=limits(texts, settings.max_length, attention_at),
        padding=padding(train.lengths(), batch_size, seed),
        actions=settings.clean.model_dump(),
        findings=_findings_by_check(settings.clean.model_dump(), [one.report for one in (train, held_out) if one]),
    )


def _findings_by_check(checks: Iterable[str], reports: list[Report]) -> dict[str, ReasonCounts]:
    findings = {check: ReasonCounts() for check in checks}
    for report in reports:
        for reason, count in report.findings.counts.items():
            check, _, what = reason.partition(": ")
            if check in findings:
                findings[check].merge(ReasonCounts({what: count}, {what: report.findings.first[reason]}))
    return findings


def sample(examples: Examples, count: int) -> list[dict[str, Any]]:
    """Some rows from the whole length of the set, with their place, input_ids and labels."""
    numbers = np.unique(np.linspace(0, len(examples.rows) - 1, num=count, dtype=int))
    return [examples.rows[int(number)] for number in numbers]
