"""How many rows a run trains on and holds out, counted as the run counts them: by what each row says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorakit.data.conversations import split_point
from lorakit.errors import UserError
from lorakit.recipe.schema import Clean, Data, Source

_ACTING = ("fix", "error")
_REWRITING = ("encoding", "html", "noise", "trivial")
_LEAVING_OUT = ("duplicates", "near_duplicates", "contradictions", "style")

Row = tuple[bytes, int]
"""The sha256 of what a row says, and how many examples it gives."""


@dataclass(frozen=True)
class Sides:
    """Examples of each source that are trained, and those held out of them."""

    train: tuple[int, ...]
    held_out: int


def sides_of(rows: Sequence[Sequence[Row]], sources: Sequence[Source], share: float | None) -> Sides:
    """The sides of a split, from every usable row of every source; `share`: what of it is held out."""
    held_out, trained = 0, [0] * len(sources)
    for number, (its, source) in enumerate(zip(rows, sources, strict=True)):
        for digest, examples in _taken(its, source.take):
            if share is not None and split_point(digest) < share:
                held_out += examples
            else:
                trained[number] += examples
    return Sides(tuple(trained), held_out)


def refuse_empty(sides: Sides, share: float | None) -> None:
    """Refuse a split that leaves a side without a row, as training does.

    Raises:
        UserError: no row is left on it.
    """
    trains = any(sides.train)
    if not trains and share is None:
        raise UserError("data.train: take leaves no row. Write a larger share, or a number of rows.")
    if share is not None and not (trains and sides.held_out):
        left = "is held out" if trains else "is left to train on"
        raise UserError(f"data.eval: with {share:g} no row {left}. Give more rows, or a file of held-out rows.")


def keeps_what_is_said(clean: Clean) -> bool:
    """Whether no check rewrites rows, which would give them other sides."""
    return all(getattr(clean, check) not in _ACTING for check in _REWRITING)


def keeps_rows(data: Data) -> bool:
    """Whether no check moves or leaves out rows by comparing them, which takes longer than a glance."""
    clean = data.clean
    if isinstance(data.eval, float):
        compares = clean.near_leakage != "off"  # near-duplicates stay on one side of the split
    else:
        compares = data.eval is not None and "fix" in (clean.leakage, clean.near_leakage)
    return not compares and all(getattr(clean, check) not in _ACTING for check in _LEAVING_OUT)


def _taken(rows: Sequence[Row], take: float | int | None) -> Iterable[Row]:
    """The rows that `take` leaves: those whose number by content is lowest."""
    if isinstance(take, float):
        return (row for row in rows if _number(row) <= int(take * 2**64))
    return rows if take is None else sorted(rows, key=_number)[:take]


def _number(row: Row) -> int:
    return int.from_bytes(row[0][8:16], "big")
