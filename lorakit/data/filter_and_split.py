"""Which rows stay, and on which side, once all are known: `take`, the split, the checks of `data.clean` that compare
rows, and leakage: rows that are trained on and held out as well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorakit.data.cleaning import dataset_checks, minhash
from lorakit.data.cleaning.dataset_checks import Leak
from lorakit.data.cleaning.row_stats import RowStats, take_rows
from lorakit.data.dataset import Examples, count_examples
from lorakit.data.pipeline import PipelineResult
from lorakit.data.report import ReasonCounts
from lorakit.data.worker import Rules
from lorakit.errors import UserError
from lorakit.recipe.schema import Clean

_CASES = 5


@dataclass(frozen=True)
class Findings:
    """What a check says of some rows, `cases` what of it is each row's own. `leave_out`: those that a fix removes."""

    rows: np.ndarray
    reason: str
    cases: Callable[[np.ndarray], list[str]]
    leave_out: np.ndarray


class RowSelection:
    """What became of the usable rows: which `stay`, which of them are `held_out`, and what was counted, on the trained
    and on the held-out side."""

    def __init__(self, result: PipelineResult, rules: Rules) -> None:
        self.result = result
        count = len(result.digests)
        self.stay = np.ones(count, dtype=bool)
        self.held_out = result.digests[:, 0] < np.uint64(min(int((rules.share or 0.0) * 2**64), 2**64 - 1))
        self.passed_over = np.zeros(2, dtype=int)
        self.dropped = (ReasonCounts(), ReasonCounts())
        self.findings = (ReasonCounts(), ReasonCounts())

    def take(self, source: int, take: int | float | None) -> None:
        """Of a source's rows keep those whose number by content is lowest. A share has been taken by the workers."""
        rows = np.flatnonzero(self.result.source == source)
        if isinstance(take, int) and len(rows) > take:
            numbers = self.result.digests[rows, 1]
            rest = np.sort(rows[np.argsort(numbers, kind="stable")[take:]])
            self.stay[rest] = False
            self.passed_over += np.bincount(self.held_out[rest].astype(int), minlength=2)

    def keep_alike_together(self, traits: RowStats) -> None:
        """Near-duplicates go to one side of the split, and rows that say the same go where the first of them goes."""
        assert traits.signature is not None
        rows = np.flatnonzero(self.stay)
        first = dataset_checks.duplicates(traits.content[rows])
        unique = np.flatnonzero(first == np.arange(len(rows)))
        sides = np.empty(len(rows), np.int8)
        sides[unique] = minhash.split_sides(traits.signature[rows[unique]], self.held_out[rows[unique]])
        sides = sides[first]
        neither = rows[sides < 0]
        self.held_out[rows] = sides == 1
        reason = "nearly the same as rows on both sides of the split"
        self.drop(Findings(neither, reason, lambda some: [""] * len(some), neither), reason)

    def act(self, check: str, action: str, findings: Findings) -> None:
        """Count what a check has to say, and leave out rows where it is to fix it.

        Raises:
            UserError: the action is `error`.
        """
        if not len(findings.rows):
            return
        if action == "error":
            first = findings.rows[:1]
            case = f" ({findings.cases(first)[0]})" if findings.cases(first)[0] else ""
            raise UserError(
                f"{self.result.where(first)[0]}: {findings.reason}{case}; {len(findings.rows):,} rows in all. Fix the "
                f"rows, or write data.clean.{check}: fix or report."
            )
        self._count(self.findings, findings.rows, f"{check}: {findings.reason}", findings)
        if action == "fix":
            self.drop(findings, f"left out by data.clean.{check}: {findings.reason}")

    def drop(self, findings: Findings, reason: str) -> None:
        """Leave rows out, and count why."""
        self.stay[findings.leave_out] = False
        self._count(self.dropped, findings.leave_out, reason, findings)

    def _count(
        self, counts: tuple[ReasonCounts, ReasonCounts], rows: np.ndarray, reason: str, findings: Findings
    ) -> None:
        """Count rows with a reason, on the side that each is on."""
        for side in (0, 1):
            own = rows[self.held_out[rows] == bool(side)]
            first = own[:_CASES]
            for where, case in zip(self.result.where(first), findings.cases(first), strict=True):
                counts[side].add(reason, where, case)
            if len(own) > len(first):
                counts[side].counts[reason] += len(own) - len(first)


def select_rows(
    result: PipelineResult, clean: Clean, rules: Rules, takes: Sequence[int | float | None]
) -> RowSelection:
    """What stays of all usable rows.

    Raises:
        UserError: a check whose action is `error` found something.
    """
    selection, traits = RowSelection(result, rules), result.traits
    for source, take in enumerate(takes):
        selection.take(source, take)
    if traits is None:
        return selection
    if rules.apart:
        selection.keep_alike_together(traits)
    for check, find in _CHECKS.items():
        needed = {"near_duplicates": traits.signature, "style": traits.style}.get(check, traits.content)
        action = getattr(clean, check)
        if action != "off" and needed is not None:
            rows = np.flatnonzero(selection.stay)
            selection.act(check, action, find(result, take_rows(traits, rows), rows))
    return selection


def _duplicates(result: PipelineResult, traits: RowStats, rows: np.ndarray) -> Findings:
    return _repeated(result, dataset_checks.duplicates(traits.content), rows, "the same as an earlier row")


def _near_duplicates(result: PipelineResult, traits: RowStats, rows: np.ndarray) -> Findings:
    assert traits.signature is not None
    first, own = minhash.group_near_duplicates(traits.signature), np.arange(len(rows))
    first = np.where(dataset_checks.duplicates(traits.content) == own, first, own)  # exact copies are another check's
    return _repeated(result, first, rows, "nearly the same as an earlier row")


def _repeated(result: PipelineResult, first: np.ndarray, rows: np.ndarray, reason: str) -> Findings:
    repeated = np.flatnonzero(first != np.arange(len(rows)))
    others = dict(zip(rows[repeated].tolist(), rows[first[repeated]].tolist(), strict=True))
    return Findings(rows[repeated], reason, lambda some: _as_another(result, others, some), rows[repeated])


def _contradictions(result: PipelineResult, traits: RowStats, rows: np.ndarray) -> Findings:
    group, agrees = dataset_checks.contradictions(traits.prompt, traits.answer)
    grouped = np.flatnonzero(group >= 0)
    others = dict(zip(rows[grouped].tolist(), rows[group[grouped]].tolist(), strict=True))
    reason = "another answer to the same prompt"
    return Findings(rows[grouped], reason, lambda some: _as_another(result, others, some), rows[~agrees])


def _style(result: PipelineResult, traits: RowStats, rows: np.ndarray) -> Findings:
    reasons = {int(rows[row]): reason for row, reason in dataset_checks.outliers(traits).items()}
    outliers = np.array(list(reasons), dtype=np.int64)
    return Findings(outliers, "written unlike the others", lambda some: [reasons[int(row)] for row in some], outliers)


def _as_another(result: PipelineResult, others: dict[int, int], rows: np.ndarray) -> list[str]:
    """For each row the place of the one that it belongs to; nothing where that is the row itself."""
    partners = [others[int(row)] for row in rows]
    return [
        f"as {where}" if partner != row else ""
        for where, partner, row in zip(result.where(partners), partners, rows.tolist(), strict=True)
    ]


_CHECKS = {
    "duplicates": _duplicates,
    "near_duplicates": _near_duplicates,
    "contradictions": _contradictions,
    "style": _style,
}


def find_leaks(train: RowStats, held_out: RowStats, nearly: bool) -> list[Leak]:
    """Training rows that are held out as well; with `nearly`, those that resemble a held-out row and are not it."""
    same = dataset_checks.leaks(train, held_out)
    if not nearly:
        return same
    if train.signature is None or held_out.signature is None:
        return []
    known = {leak.row for leak in same}
    pairs = zip(*(rows.tolist() for rows in minhash.find_leaks(train.signature, held_out.signature)), strict=True)
    return [Leak(row, theirs, "nearly the same as a held-out row") for row, theirs in pairs if row not in known]


def remove_leaks(train: Examples, held_out: Examples, clean: Clean) -> Examples:
    """The training examples without rows that are held out, or nearly, where the recipe says so.

    Raises:
        UserError: there are some, and the recipe says to stop, or all rows are.
    """
    for check, action in (("leakage", clean.leakage), ("near_leakage", clean.near_leakage)):
        if action == "off" or train.traits is None or held_out.traits is None:
            continue
        leaks = find_leaks(train.traits, held_out.traits, nearly=check == "near_leakage")
        if leaks and action == "error":
            cases = "; ".join(
                f"{train.where(leak.row)} is {leak.reason}, {held_out.where(leak.held_out)}" for leak in leaks[:3]
            )
            raise UserError(
                f"{len(leaks):,} of the training rows are held out as well: {cases}. Scores on rows that were trained "
                f"on say nothing: write data.clean.{check}: fix to leave them out of the training, or give other "
                "held-out rows."
            )
        fixes = action == "fix"
        counts = train.report.dropped if fixes else train.report.findings
        for leak in leaks:
            reason = f"left out by data.clean.{check}: {leak.reason}" if fixes else f"{check}: {leak.reason}"
            if len(counts.first.get(reason, [])) < _CASES:
                counts.add(reason, train.where(leak.row), f"as {held_out.where(leak.held_out)}")
            else:
                counts.counts[reason] += 1
        if leaks and fixes:
            train = _without_rows(train, [leak.row for leak in leaks], check)
    return train


def _without_rows(train: Examples, rows: list[int], check: str) -> Examples:
    stay = np.ones(train.report.used, dtype=bool)
    stay[rows] = False
    if not stay.any():
        raise UserError(f"no training row is left: all {len(stay):,} are held out as well (data.clean.{check}: fix).")
    examples = stay[train.index.owner]
    index = train.index.select(examples, stay)
    count_examples(train.report, index)
    return replace(
        train,
        rows=train.rows.select(np.flatnonzero(examples)),
        index=index,
        traits=None if train.traits is None else take_rows(train.traits, np.flatnonzero(stay)),
    )
