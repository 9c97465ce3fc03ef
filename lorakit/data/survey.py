"""The survey of a recipe's rows, for `lorakit data`: sizes, lengths, padding and what the checks found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of
from lorakit.data.lengths import Limit, Padding, histogram, limits, padding, quantiles
from lorakit.data.report import Report
from lorakit.progress import Progress
from lorakit.recipe.schema import Data


@dataclass(frozen=True)
class CheckSummary:
    """What one check of `data.clean` found: the number of rows for each reason, and the first cases."""

    name: str
    action: str
    counts: dict[str, int]
    first: dict[str, list[str]]

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"name": self.name, "action": self.action, "found": self.counts, "first": self.first, "rows": self.rows}


@dataclass(frozen=True)
class Survey:
    """The rows of a recipe. `lengths`, `bins` and `limits` are of every text that can be encoded, fitting or not."""

    train: Examples
    held_out: Examples | None
    lengths: dict[str, int]
    bins: list[tuple[int, int, int]]
    limits: list[Limit]
    padding: Padding
    checks: list[CheckSummary]

    @property
    def stopping(self) -> list[str]:
        """The checks that would stop a run at what they found."""
        return [check.name for check in self.checks if check.action == "error" and check.rows]

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
            "checks": {check.name: check.to_dict() for check in self.checks},
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
        checks=_checks(settings.clean.model_dump(), [one.report for one in (train, held_out) if one]),
    )


def _checks(actions: Mapping[str, str], reports: list[Report]) -> list[CheckSummary]:
    results = {name: CheckSummary(name, action, {}, {}) for name, action in actions.items()}
    for report in reports:
        for reason, count in report.findings.counts.items():
            check, _, what = reason.partition(": ")
            if check in results:
                counts, first = results[check].counts, results[check].first
                counts[what] = counts.get(what, 0) + count
                first[what] = [*first.get(what, []), *report.findings.first[reason]][:5]
    return list(results.values())


def sample(examples: Examples, count: int) -> list[dict[str, Any]]:
    """Some rows from the whole length of the set, with their place, input_ids and labels."""
    numbers = np.unique(np.linspace(0, len(examples.rows) - 1, num=count, dtype=int))
    return [examples.rows[int(number)] for number in numbers]
