"""Leakage: rows that are trained on and held out as well, so that their scores would say nothing."""

from dataclasses import replace

import numpy as np

from lorakit.data.cleaning.dataset_checks import Leak
from lorakit.data.cleaning.row_stats import take_rows
from lorakit.data.dataset import Examples
from lorakit.data.filter_and_split import find_leaks
from lorakit.data.report import ReasonCounts
from lorakit.errors import UserError
from lorakit.recipe.schema import Clean

_CASES = 5


def remove_leaks(train: Examples, held_out: Examples, clean: Clean) -> Examples:
    """The training examples without rows that are held out, or nearly, where the recipe says so.

    Raises:
        UserError: there are some, and the recipe says to stop.
    """
    for check, action in (("leakage", clean.leakage), ("near_leakage", clean.near_leakage)):
        if action == "off" or train.traits is None or held_out.traits is None:
            continue
        leaks = find_leaks(train.traits, held_out.traits, nearly=check == "near_leakage")
        if not leaks:
            continue
        if action == "error":
            raise UserError(_refusal(check, leaks, train, held_out))
        if action == "fix":
            train = _without_rows(train, held_out, check, leaks)
        else:
            _count(train.report.findings, f"{check}: ", leaks, train, held_out)
    return train


def _count(counted: ReasonCounts, before: str, leaks: list[Leak], train: Examples, held_out: Examples) -> None:
    for leak in leaks:
        reason = f"{before}{leak.reason}"
        if len(counted.first.get(reason, [])) < _CASES:
            counted.add(reason, train.where(leak.row), f"as {held_out.where(leak.held_out)}")
        else:
            counted.counts[reason] += 1


def _refusal(check: str, leaks: list[Leak], train: Examples, held_out: Examples) -> str:
    cases = "; ".join(
        f"{train.where(leak.row)} is {leak.reason}, {held_out.where(leak.held_out)}" for leak in leaks[:3]
    )
    return (
        f"{len(leaks):,} of the training rows are held out as well: {cases}. Scores on rows that were trained on say "
        f"nothing: write data.clean.{check}: fix to leave them out of the training, or give other held-out rows."
    )


def _without_rows(train: Examples, held_out: Examples, check: str, leaks: list[Leak]) -> Examples:
    """The training examples but for those of the rows that leak; the report counts them as dropped."""
    stays = np.ones(train.report.used, dtype=bool)
    stays[[leak.row for leak in leaks]] = False
    if not stays.any():
        raise UserError(f"no training row is left: all {len(stays):,} are held out as well (data.clean.{check}: fix).")
    examples, report, numbers = stays[train.numbers.owner], train.report, train.numbers
    _count(report.dropped, f"left out by data.clean.{check}: ", leaks, train, held_out)
    for number, source in enumerate(report.sources):
        its = examples & (numbers.source == number)
        source.used, source.examples = len(np.unique(numbers.owner[its])), int(its.sum())
        source.tokens, source.trained_tokens = int(numbers.length[its].sum()), int(numbers.trained[its].sum())
    report.used = int(stays.sum())
    report.add_up(int(numbers.length[examples].max()))
    return replace(
        train,
        rows=train.rows.select(np.flatnonzero(examples)),
        numbers=numbers.of(examples, stays),
        traits=None if train.traits is None else take_rows(train.traits, np.flatnonzero(stays)),
    )
