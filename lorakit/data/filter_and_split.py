"""Which rows stay, and on which side: what `take`, `data.clean` and the split decide once all rows are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.data.cleaning import dataset_checks, minhash
from lorakit.data.cleaning.row_stats import RowStats, take_rows
from lorakit.data.pipeline import PipelineResult
from lorakit.data.report import ReasonCounts
from lorakit.data.worker import Rules
from lorakit.errors import UserError
from lorakit.recipe.schema import Clean

_CASES = 5


@dataclass(frozen=True)
class CheckResult:
    """Rows of which a check has something to say: their places, what it says, and what of it is each row's own.

    `leave_out`: those that a fix takes away.
    """

    rows: np.ndarray
    reason: str
    cases: Callable[[np.ndarray], list[str]]
    leave_out: np.ndarray


class RowSelection:
    """What became of the usable rows: which are `kept`, which of them are `held_out`, and what was counted, on the
    trained and on the held-out side."""

    def __init__(self, gathered: PipelineResult, rules: Rules) -> None:
        self.gathered = gathered
        count = len(gathered.digests)
        self.used = np.ones(count, dtype=bool)
        share = rules.share or 0.0
        self.held_out = gathered.digests[:, 0] < np.uint64(min(int(share * 2**64), 2**64 - 1))
        self.passed_over = np.zeros(2, dtype=int)
        self.dropped, self.found = (ReasonCounts(), ReasonCounts()), (ReasonCounts(), ReasonCounts())

    def pass_over(self, rows: np.ndarray) -> None:
        """Leave out rows that `take` does not choose."""
        self.used[rows] = False
        self.passed_over += np.bincount(self.held_out[rows].astype(int), minlength=2)

    def tell(
        self, counted: tuple[ReasonCounts, ReasonCounts], rows: np.ndarray, reason: str, found: CheckResult
    ) -> None:
        """Count rows with a reason, on the side that each is on."""
        for side in (0, 1):
            its = rows[self.held_out[rows] == bool(side)]
            first = its[:_CASES]
            for where, case in zip(self.gathered.where(first), found.cases(first), strict=True):
                counted[side].add(reason, where, case)
            if len(its) > len(first):
                counted[side].counts[reason] += len(its) - len(first)


def select_rows(
    gathered: PipelineResult, clean: Clean, rules: Rules, takes: Sequence[int | float | None]
) -> RowSelection:
    """What stays of all usable rows.

    Raises:
        UserError: a check whose action is `error` found something.
    """
    decided = RowSelection(gathered, rules)
    for source, take in enumerate(takes):
        _take(decided, source, take)
    if rules.apart and gathered.traits is not None:
        _keep_together(decided, gathered.traits)
    for check, find in _CHECKS.items():
        action = getattr(clean, check)
        if gathered.traits is not None and action != "off" and _is_possible(check, gathered.traits):
            kept = np.flatnonzero(decided.used)
            for found in find(gathered, take_rows(gathered.traits, kept), kept):
                _act(decided, check, action, found)
    return decided


def find_leaks(train: RowStats, held_out: RowStats, nearly: bool) -> list[dataset_checks.Leak]:
    """Training rows that are held out as well; with `nearly`, those that resemble a held-out row and are not it."""
    same = dataset_checks.leaks(train, held_out)
    if not nearly:
        return same
    if train.signature is None or held_out.signature is None:
        return []
    rows, theirs = minhash.find_leaks(train.signature, held_out.signature)
    known = {leak.row for leak in same}
    pairs = zip(rows.tolist(), theirs.tolist(), strict=True)
    return [
        dataset_checks.Leak(row, held, "nearly the same as a held-out row") for row, held in pairs if row not in known
    ]


def _take(decided: RowSelection, source: int, take: int | float | None) -> None:
    """Of a source's rows keep those whose number by content is lowest."""
    rows = np.flatnonzero(decided.gathered.source == source)
    if isinstance(take, int) and len(rows) > take:
        numbers = decided.gathered.digests[rows, 1]
        decided.pass_over(np.sort(rows[np.argsort(numbers, kind="stable")[take:]]))


def _keep_together(decided: RowSelection, traits: RowStats) -> None:
    """Near-duplicates go to one side of the split, and rows that say the same go where the first of them goes."""
    assert traits.signature is not None
    kept = np.flatnonzero(decided.used)
    first = dataset_checks.duplicates(traits.content[kept])
    unique = np.flatnonzero(first == np.arange(len(kept)))
    sides = np.empty(len(kept), np.int8)
    sides[unique] = minhash.split_sides(traits.signature[kept[unique]], decided.held_out[kept[unique]])
    sides = sides[first]
    neither = kept[sides < 0]
    decided.held_out[kept] = sides == 1
    decided.used[neither] = False
    found = CheckResult(neither, "", lambda rows: [""] * len(rows), neither)
    decided.tell(decided.dropped, neither, "nearly the same as rows on both sides of the split", found)


def _act(decided: RowSelection, check: str, action: str, found: CheckResult) -> None:
    if not len(found.rows):
        return
    if action == "error":
        first = found.rows[:1]
        raise UserError(
            f"{decided.gathered.where(first)[0]}: {found.reason}"
            + (f" ({found.cases(first)[0]})" if found.cases(first)[0] else "")
            + f"; {len(found.rows):,} rows in all. Fix the rows, or write data.clean.{check}: fix or report."
        )
    if action == "fix":
        decided.used[found.leave_out] = False
        decided.tell(decided.found, found.rows, f"{check}: {found.reason}", found)
        decided.tell(decided.dropped, found.leave_out, f"left out by data.clean.{check}: {found.reason}", found)
    else:
        decided.tell(decided.found, found.rows, f"{check}: {found.reason}", found)


def _is_possible(check: str, traits: RowStats) -> bool:
    """Whether what the check reads was asked for."""
    if check == "near_duplicates":
        return traits.signature is not None
    return traits.style is not None if check == "style" else True


def _duplicates(gathered: PipelineResult, traits: RowStats, kept: np.ndarray) -> list[CheckResult]:
    return _repeated(gathered, dataset_checks.duplicates(traits.content), kept, "the same as an earlier row")


def _near_duplicates(gathered: PipelineResult, traits: RowStats, kept: np.ndarray) -> list[CheckResult]:
    assert traits.signature is not None
    first = minhash.group_near_duplicates(traits.signature)
    exact = dataset_checks.duplicates(traits.content)
    own = np.arange(len(kept))
    first = np.where(exact == own, first, own)  # exact copies are another check's
    return _repeated(gathered, first, kept, "nearly the same as an earlier row")


def _repeated(gathered: PipelineResult, first: np.ndarray, kept: np.ndarray, reason: str) -> list[CheckResult]:
    rows = np.flatnonzero(first != np.arange(len(kept)))
    of = dict(zip(kept[rows].tolist(), kept[first[rows]].tolist(), strict=True))
    return [CheckResult(kept[rows], reason, lambda some: _places(gathered, of, some), kept[rows])]


def _contradictions(gathered: PipelineResult, traits: RowStats, kept: np.ndarray) -> list[CheckResult]:
    found = dataset_checks.contradictions(traits.prompt, traits.answer)
    rows = np.flatnonzero(found.group >= 0)
    of = dict(zip(kept[rows].tolist(), kept[found.group[rows]].tolist(), strict=True))
    reason = "another answer to the same prompt"
    return [CheckResult(kept[rows], reason, lambda some: _places(gathered, of, some), kept[~found.agrees])]


def _style(gathered: PipelineResult, traits: RowStats, kept: np.ndarray) -> list[CheckResult]:
    outliers = dataset_checks.outliers(traits)
    reasons = {int(kept[outlier.row]): outlier.reason for outlier in outliers}
    rows = np.array(list(reasons), dtype=np.int64)
    return [CheckResult(rows, "written unlike the others", lambda some: [reasons[int(row)] for row in some], rows)]


def _places(gathered: PipelineResult, of: dict[int, int], rows: np.ndarray) -> list[str]:
    """For each row the place of the one that it belongs to; nothing where that is the row itself."""
    others = [of[int(row)] for row in rows]
    return [
        f"as {where}" if other != row else ""
        for where, other, row in zip(gathered.where(others), others, rows.tolist(), strict=True)
    ]


_CHECKS = {
    "duplicates": _duplicates,
    "near_duplicates": _near_duplicates,
    "contradictions": _contradictions,
    "style": _style,
}
