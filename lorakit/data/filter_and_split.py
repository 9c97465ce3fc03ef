"""Which rows stay, and on which side, once all are known: `take`, the split, the checks of `data.clean` that compare
rows, and leakage: rows that are trained on and held out as well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lorakit.data.cleaning import dataset_checks, minhash
from lorakit.data.cleaning.dataset_checks import Leak
from lorakit.data.cleaning.row_stats import RowStats, take_rows
from lorakit.data.dataset import Examples, count_examples
from lorakit.data.example_arrays import UsableRows
from lorakit.data.worker import Rules
from lorakit.errors import UserError
from lorakit.recipe.schema import Clean

_CASES = 5


@dataclass(frozen=True)
class Findings:
    """What a check says of some rows. `leave_out`: those that a fix removes. `cases`: a row's own words, or its
    counterpart."""

    rows: np.ndarray
    reason: str
    leave_out: np.ndarray
    cases: Mapping[int, int | str]


class RowSelection:
    """What became of the usable rows: which `stay`, which are `held_out`; the reports of `result` count the others."""

    def __init__(self, result: UsableRows, rules: Rules) -> None:
        self.result = result
        self.stay = np.ones(len(result.digests), dtype=bool)
        share = rules.share if isinstance(rules.share, float) else 0.0
        self.held_out = result.digests[:, 0] < np.uint64(min(int(share * 2**64), 2**64 - 1))

    def take(self, source: int, take: int | float | None) -> None:
        """Of a source's rows keep those whose number by content is lowest. A share has been taken by the workers."""
        rows = np.flatnonzero(self.result.source == source)
        if isinstance(take, int) and len(rows) > take:
            rest = rows[np.argsort(self.result.digests[rows, 1], kind="stable")[take:]]
            self.stay[rest] = False
            for side, report in enumerate(self.result.reports):
                report.passed_over += int((self.held_out[rest] == bool(side)).sum())

    def hold_out(self, number: int) -> None:
        """Hold out so many of the rows that stay: those whose number by content is lowest."""
        rows = np.flatnonzero(self.stay)
        self.held_out[rows[np.argsort(self.result.digests[rows, 0], kind="stable")[:number]]] = True

    def keep_alike_together(self, traits: RowStats) -> None:
        """Near-duplicates go to one side of the split, and rows that say the same go where the first of them goes."""
        assert traits.signature is not None
        rows = np.flatnonzero(self.stay)
        first = dataset_checks.duplicates(traits.content[rows])
        unique = np.flatnonzero(first == np.arange(len(rows)))
        sides = np.empty(len(rows), np.int8)
        sides[unique] = minhash.split_sides(traits.signature[rows[unique]], self.held_out[rows[unique]])
        sides = sides[first]
        self.held_out[rows] = sides == 1
        neither = rows[sides < 0]
        self._drop(Findings(neither, "nearly the same as rows on both sides of the split", neither, {}), "")

    def act(self, check: str, action: str, findings: Findings) -> None:
        """Count what a check has to say, and leave out rows where it is to fix it; a `UserError` where the action is
        `error`."""
        if not len(findings.rows):
            return
        if action == "error":
            ((where, case),) = self._cases(findings.cases, findings.rows[:1])
            what = f"{findings.reason} ({case})" if case else findings.reason
            what = f"{what}; {len(findings.rows):,} rows in all"
            raise UserError(f"{where}: {what}. Fix the rows, or write data.clean.{check}: fix or report.")
        self._count("findings", findings.rows, f"{check}: {findings.reason}", findings.cases)
        if action == "fix":
            self._drop(findings, f"left out by data.clean.{check}: ")

    def _drop(self, findings: Findings, by: str) -> None:
        self.stay[findings.leave_out] = False
        self._count("dropped", findings.leave_out, by + findings.reason, findings.cases)

    def _count(self, of: str, rows: np.ndarray, reason: str, cases: Mapping[int, int | str]) -> None:
        for report, own in zip(
            self.result.reports, (rows[~self.held_out[rows]], rows[self.held_out[rows]]), strict=True
        ):
            getattr(report, of).add_rows(reason, len(own), self._cases(cases, own[:_CASES]))

    def _cases(self, cases: Mapping[int, int | str], rows: np.ndarray) -> list[tuple[str, str]]:
        """The place of each row, and what is its own."""
        own = [cases.get(row, "") for row in rows.tolist()]
        others = iter(self.result.where([case for case in own if isinstance(case, int)]))
        words = [f"as {next(others)}" if isinstance(case, int) else case for case in own]
        return list(zip(self.result.where(rows), words, strict=True))


def select_rows(result: UsableRows, clean: Clean, rules: Rules, takes: Sequence[int | float | None]) -> RowSelection:
    """What stays of all usable rows; a `UserError` where a check whose action is `error` found something."""
    selection, traits = RowSelection(result, rules), result.traits
    for source, take in enumerate(takes):
        selection.take(source, take)
    if isinstance(rules.share, int):
        selection.hold_out(rules.share)
    if traits is None:
        return selection
    if rules.apart:
        selection.keep_alike_together(traits)
    for check, find in _CHECKS.items():
        needed = {"near_duplicates": traits.signature, "style": traits.style}.get(check, traits.content)
        action = getattr(clean, check)
        if action != "off" and needed is not None:
            rows = np.flatnonzero(selection.stay)
            selection.act(check, action, find(take_rows(traits, rows), rows))
    return selection


def _duplicates(traits: RowStats, rows: np.ndarray, near: bool = False) -> Findings:
    own, first = np.arange(len(rows)), dataset_checks.duplicates(traits.content)
    if near:
        assert traits.signature is not None  # exact copies are the other check's
        first = np.where(first == own, minhash.group_near_duplicates(traits.signature), own)
    repeated = np.flatnonzero(first != own)
    reason = f"{'nearly ' if near else ''}the same as an earlier row"
    return Findings(rows[repeated], reason, rows[repeated], _others(rows, repeated, first))


def _contradictions(traits: RowStats, rows: np.ndarray) -> Findings:
    group, agrees = dataset_checks.contradictions(traits.prompt, traits.answer)
    grouped = np.flatnonzero(group >= 0)
    reason = "another answer to the same prompt"
    return Findings(rows[grouped], reason, rows[~agrees], _others(rows, grouped[group[grouped] != grouped], group))


def _others(rows: np.ndarray, some: np.ndarray, first: np.ndarray) -> dict[int, int]:
    """The row that each of some belongs to."""
    return dict(zip(rows[some].tolist(), rows[first[some]].tolist(), strict=True))


def _style(traits: RowStats, rows: np.ndarray) -> Findings:
    reasons = {int(rows[row]): reason for row, reason in dataset_checks.outliers(traits).items()}
    outliers = np.array(list(reasons), dtype=np.int64)
    return Findings(outliers, "written unlike the others", outliers, reasons)


_CHECKS: dict[str, Callable[[RowStats, np.ndarray], Findings]] = {
    "duplicates": _duplicates, "near_duplicates": partial(_duplicates, near=True), "contradictions": _contradictions,
    "style": _style,
}  # fmt: skip


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
    """The training examples without rows that are held out, or nearly, as the recipe says; a `UserError` where it says
    to stop or no row is left."""
    for check, action in (("leakage", clean.leakage), ("near_leakage", clean.near_leakage)):
        if action == "off" or train.traits is None or held_out.traits is None:
            continue
        leaks = find_leaks(train.traits, held_out.traits, nearly=check == "near_leakage")
        if leaks and action == "error":
            places = [(train.where(leak.row), leak.reason, held_out.where(leak.held_out)) for leak in leaks[:3]]
            cases = "; ".join(f"{ours} is {reason}, {theirs}" for ours, reason, theirs in places)
            what = f"{len(leaks):,} of the training rows are held out as well: {cases}"
            remedy = f"write data.clean.{check}: fix to leave them out of the training, or give other held-out rows"
            raise UserError(f"{what}. Scores on rows that were trained on say nothing: {remedy}.")
        fixes = action == "fix"
        counts = train.report.dropped if fixes else train.report.findings
        words = f"left out by data.clean.{check}" if fixes else check
        for reason in dict.fromkeys(leak.reason for leak in leaks):
            own = [leak for leak in leaks if leak.reason == reason]
            first = [(train.where(leak.row), f"as {held_out.where(leak.held_out)}") for leak in own[:_CASES]]
            counts.add_rows(f"{words}: {reason}", len(own), first)
        if not (leaks and fixes):
            continue
        stay = np.ones(train.report.used, dtype=bool)
        stay[[leak.row for leak in leaks]] = False
        if not stay.any():
            what = f"no training row is left: all {len(stay):,} are held out as well"
            raise UserError(f"{what} (data.clean.{check}: fix). Give other held-out rows.")
        examples, traits = stay[train.index.owner], take_rows(train.traits, np.flatnonzero(stay))
        selected = np.flatnonzero(examples) if train.selected is None else train.selected[examples]
        train = replace(train, selected=selected, index=train.index.select(examples, stay), traits=traits)
        count_examples(train.report, train.index)
    return train
